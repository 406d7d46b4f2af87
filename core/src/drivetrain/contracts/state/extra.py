"""A plugin's own state in a checkpoint: plain data and tensors, under names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from drivetrain.errors import CheckpointError

_LONGEST = 1 << 28
"""Characters of JSON; a manifest that is longer is not read."""

_DEEPEST = 200
"""Lists and dicts inside each other."""

_WIDEST = 10_000
"""Bits of an integer. Python does not write more than 4,300 digits."""


class StateWriter:
    """Collects plain data (for JSON) and tensors under the name of whoever writes them."""

    def __init__(self) -> None:
        self.data: dict[bool, dict[str, Any]] = {False: {}, True: {}}
        self.tensors: dict[bool, dict[str, torch.Tensor]] = {False: {}, True: {}}

    def put(self, key: str, value: Any, *, per_rank: bool = False) -> None:
        """Store ``value`` under ``key``: the plugin's name, a slash, and what it is.

        Args:
            key: name under which :class:`StateReader` finds it again.
            value: a tensor, or plain data: numbers, strings, booleans, None, lists, dicts.
            per_rank: whether it differs between ranks. Such state comes back only in the layout
                that it was saved in; otherwise rank 0's value comes back everywhere.

        Raises:
            CheckpointError: not plain data, or the key is taken.
        """
        if key in self.keys:
            raise CheckpointError(f"two plugins write checkpoint state under {key!r}")
        if isinstance(value, torch.Tensor):
            self.tensors[per_rank][key] = value
        else:
            self.data[per_rank][key] = plain(value, key)

    @property
    def keys(self) -> set[str]:
        """All keys in use."""
        return {
            key for stores in (self.data, self.tensors) for part in stores.values() for key in part
        }


class StateReader:
    """What :class:`StateWriter` stored, and nothing else."""

    def __init__(self, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self._data = data
        self._tensors = tensors

    def get(self, key: str, default: Any = None) -> Any:
        """The value stored under ``key``."""
        if key in self._tensors:
            return self._tensors[key]
        return self._data.get(key, default)


def plain(value: Any, what: str) -> Any:
    """``value`` if it survives JSON unchanged, with lists for tuples.

    Raises:
        CheckpointError: it does not; names the first part at fault.
    """
    try:
        _length(value, {}, 0, _LONGEST)
    except _NotPlainError as fault:
        raise CheckpointError(
            f"{fault.at(what)} is not plain data (numbers, strings, booleans, None, lists, dicts "
            "with string keys); convert it before saving, e.g. vars(args), tensor.tolist(), "
            "str(path)"
        ) from None
    return json.loads(json.dumps(value))


def is_plain(value: Any, longest: int = _LONGEST) -> bool:
    """True if :func:`plain` takes ``value`` and makes at most ``longest`` characters of it."""
    try:
        _length(value, {}, 0, longest)
    except _NotPlainError:
        return False
    return True


def tupled(current: Any, saved: Any) -> Any:
    """``saved`` as a tuple where ``current`` is one; JSON turns tuples (betas) into lists."""
    return tuple(saved) if isinstance(current, tuple) and isinstance(saved, list) else saved


class _NotPlainError(Exception):
    """Part of a value is not plain data.

    Args:
        before: what stands before the name of the part.
        after: what stands behind it.
    """

    def __init__(self, before: str, after: str) -> None:
        self.before, self.after = before, after
        self.steps: list[str] = []

    def at(self, root: str) -> str:
        return f"{self.before}{root}{''.join(reversed(self.steps))}{self.after}"


def _length(value: Any, known: dict[int, int], depth: int, longest: int) -> int:
    """About how many characters a value has as JSON.

    A list that is in others many times is looked at once: a few that double each other would take
    more time and memory than there is.

    Args:
        value: the value.
        known: lengths by identity, of lists and dicts that were looked at; 0 while they are.
        depth: lists and dicts that it is inside of.
        longest: more than this is a fault.
    """
    if isinstance(value, str):
        return len(value) + 4
    if type(value) is int and value.bit_length() > _WIDEST:
        raise _NotPlainError("", " (an integer of thousands of digits)")
    if value is None or isinstance(value, (bool, int, float)):
        return 8
    if not isinstance(value, (list, tuple, dict)):
        raise _NotPlainError("", f" ({type(value).__name__})")
    if known.get(id(value)) == 0 or depth > _DEEPEST:
        raise _NotPlainError("", " (nested too deeply)")
    if id(value) not in known:
        known[id(value)], length = 0, 2
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict) and not isinstance(key, str):
                raise _NotPlainError(f"key {key!r} of ", "")
            try:
                length += _length(item, known, depth + 1, longest)
            except _NotPlainError as fault:
                fault.steps.append(f".{key}" if isinstance(value, dict) else f"[{key}]")
                raise
            length += len(key) if isinstance(key, str) else 0
            if length > longest:
                raise _NotPlainError("", f" (more than {longest:,} characters of JSON)")
        known[id(value)] = length
    return known[id(value)]
