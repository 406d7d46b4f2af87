"""What fits: the memory there is, the largest micro-batch, and what to change where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drivetrain.errors import DrivetrainError
from drivetrain.plan.registry import Registry
from drivetrain_cli.planning.rehearsed import Rehearsed

_LARGEST, _TURNS = 4096, 12

Rehearsal = Callable[[Sequence[str]], Sequence[Rehearsed]]
"""Overlays -> each rank that may need most."""


def needed(found: Sequence[Rehearsed]) -> int:
    """Most bytes that any rank's device has to have, with what its allocator holds beside."""
    return max(each.needs for each in found)


@dataclass(frozen=True)
class Change:
    """Something that makes a job fit.

    Args:
        overlays: ``path=value`` that do it.
        needs: bytes of a device then.
    """

    overlays: tuple[str, ...]
    needs: int


def largest_micro_batch(
    rehearse: Rehearsal, micro: int, limit: int, *, now: int
) -> tuple[int, int]:
    """The largest micro-batch that fits, and what it needs; 0 if none does.

    Every size that is told was rehearsed. Where the search ends early, larger ones may fit, too.

    Args:
        rehearse: see :data:`Rehearsal`.
        micro: one that was rehearsed.
        limit: bytes of a device.
        now: what ``micro`` needs.
    """
    known = {micro: now}

    def fits(samples: int) -> bool:
        if samples not in known:
            known[samples] = needed(rehearse(_of_micro_batch(samples)))
        return known[samples] <= limit

    low, high = (micro, 2 * micro) if now <= limit else (0, micro)
    while low == high // 2 and low and high <= _LARGEST and fits(high):
        low, high = high, 2 * high
    for turn in range(_TURNS):
        if low + 1 >= high:
            break
        middle = (low + high) // 2
        if low in known and high in known and not turn % 2:
            share = (limit - known[low]) / max(1, known[high] - known[low])
            middle = low + int(share * (high - low))
        samples = min(max(middle, low + 1), high - 1)
        low, high = (samples, high) if fits(samples) else (low, samples)
    return low, known.get(low, 0)


def _of_micro_batch(samples: int) -> tuple[str, ...]:
    """The global batch grows with it, and accumulation stays."""
    return (f"train_micro_batch_size_per_gpu={samples}", "train_batch_size=null")


def ways_out(
    config: Mapping[str, Any], rehearse: Rehearsal, limit: int, *, on_cpu: bool, micro: int
) -> tuple[list[Change], list[str]]:
    """Changes that make the job fit, the gentlest first, and what was tried without success."""
    fitting: list[Change] = []
    tried: list[str] = []
    for overlays in _steps(config, micro, on_cpu=on_cpu):
        try:
            needs = needed(rehearse(overlays))
        except DrivetrainError as error:
            tried.append(f"{' '.join(overlays)}: {error}")
            continue
        if needs <= limit:
            fitting.append(Change(overlays, needs))
            break
        tried.append(f"{' '.join(overlays)}: needs {needs:,} bytes")
    return fitting, tried


def _steps(config: Mapping[str, Any], micro: int, *, on_cpu: bool) -> Iterator[tuple[str, ...]]:
    registry = Registry.installed()
    zero = config.get("zero_optimization") or {}
    stage = int(zero.get("stage", 0) or 0) if isinstance(zero, Mapping) else 0
    taken: tuple[str, ...] = ()
    if registry.find("plugins", "activation_checkpointing") is not None:
        taken = ("activation_checkpointing.recompute=all",)
        yield taken
    small = _of_micro_batch(1) if micro > 1 else ()
    if small:
        yield small
        yield taken + small
    if registry.find("plugins", "zero_optimization") is not None:
        for number in range(stage + 1, 4):
            yield (f"zero_optimization.stage={number}",)
            yield (f"zero_optimization.stage={number}", *taken, *small)
        offload = registry.find("plugins", "zero_optimization.offload_optimizer")
        if offload is not None and not on_cpu:
            away = ("zero_optimization.offload_optimizer.device=cpu",)
            yield (f"zero_optimization.stage={max(stage, 2)}", *away)
            more = ("zero_optimization.offload_param.device=cpu",)
            yield ("zero_optimization.stage=3", *away, *more)
            yield ("zero_optimization.stage=3", *away, *more, *taken, *small)
