"""All ranks must run the same plan: found out right after they meet."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.communicator import Communicator, Purpose, Tag
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_SHOWN = 5


def check_same_plan(
    fingerprint: Mapping[str, Any], communicator: Communicator, store: Store, device: torch.device
) -> None:
    """Compare ``fingerprint`` between all ranks.

    Collective over the world: every rank sends a hash; only if they differ, two ranks put the
    whole into ``store``, where all read it.

    Raises:
        ConfigError: on every rank, naming one that differs from most, and the first differences.
    """
    text = json.dumps(fingerprint, sort_keys=True, default=str)
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    mine = torch.tensor([digest], device=device)
    everyone = torch.empty(communicator.size("world"), dtype=mine.dtype, device=device)
    communicator.all_gather(everyone, mine, "world", Tag(Purpose.CONTROL, site="plan comparison"))
    digests = everyone.tolist()
    usual = Counter(digests).most_common(1)[0][0]
    strangers = [rank for rank, other in enumerate(digests) if other != usual]
    if not strangers:
        return
    pair = (digests.index(usual), strangers[0])
    if communicator.rank("world") in pair:
        store.set(f"plan/{communicator.rank('world')}", text)
    expected, found = (json.loads(store.get(f"plan/{rank}")) for rank in pair)
    raise ConfigError(
        f"ranks disagree about what to run, rank {pair[1]} with rank {pair[0]} and most others "
        f"({len(strangers)} of {len(digests)} ranks differ):\n"
        + "\n".join(_differences(pair, expected, found))
    )


def _differences(pair: tuple[int, int], expected: Any, found: Any) -> list[str]:
    one, other = dict(_leaves(expected)), dict(_leaves(found))
    paths = [
        path for path in {**one, **other} if one.get(path, _ABSENT) != other.get(path, _ABSENT)
    ]
    lines = [
        f"  {path} is {one.get(path, _ABSENT)} on rank {pair[0]}, "
        f"{other.get(path, _ABSENT)} on rank {pair[1]}"
        for path in paths
    ]
    more = len(lines) - _SHOWN
    return lines if more <= 0 else [*lines[:_SHOWN], f"  and {more} more"]


_ABSENT = "absent"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, json.dumps(value)
