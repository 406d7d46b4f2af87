"""Which replica has seen the beginning of a prompt."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence

CHUNK = 256
"""Characters (or a quarter as many tokens) that a prompt is compared in."""

_LONGEST = 128
"""Chunks of a prompt that count."""


def keys_of(prompt: str | Sequence[int]) -> list[bytes]:
    """One key for each full chunk, which stands for all that comes before it, too."""
    size = CHUNK if isinstance(prompt, str) else CHUNK // 4
    keys, key = list[bytes](), b""
    for end in range(size, min(len(prompt), size * _LONGEST) + 1, size):
        part = prompt[end - size : end]
        data = part.encode() if isinstance(part, str) else json.dumps(list(part)).encode()
        key = hashlib.blake2b(key + data, digest_size=8).digest()
        keys.append(key)
    return keys


class Prefixes:
    """Remembers beginnings, and forgets those that were not used for longest.

    Args:
        most: keys that are remembered.
    """

    def __init__(self, most: int = 16384) -> None:
        self._most, self._keys = most, OrderedDict[bytes, None]()

    def matched(self, keys: Sequence[bytes]) -> int:
        """How many of the first keys are known."""
        return next((n for n, key in enumerate(keys) if key not in self._keys), len(keys))

    def remember(self, keys: Sequence[bytes]) -> None:
        """Note that a prompt with these keys was computed."""
        for key in keys:
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._most:
            self._keys.popitem(last=False)

    def forget(self) -> None:
        """Forget everything, as a new process knows nothing."""
        self._keys.clear()
