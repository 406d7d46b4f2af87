"""Where the bytes of an engine live: by kind and by place."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from drivetrain.builtin.observability import MemoryBreakdown, StepsPerPrint
from drivetrain.plugin import Plugin, hookimpl

if TYPE_CHECKING:
    from drivetrain.engine import Engine
    from drivetrain.job import Job

logger = logging.getLogger("drivetrain.offload")

PLACES = ("device", "host", "nvme")
"""Columns of a table; where a device is the host, its memory is ``"device"``."""

_MIB = 1 << 20


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one kind in one place, on this rank.

    Args:
        kind: ``"parameter"``, ``"gradient"``, ``"master"``, an optimizer state's name, or what a
            buffer is for.
        place: ``"device"``, ``"host"`` or ``"nvme"``.
        nbytes: how many bytes.
        locked: how many of them are page-locked, where that is known by kind.
    """

    kind: str
    place: str
    nbytes: int
    locked: int = 0


_noted: WeakKeyDictionary[Job, list[Callable[[], Iterable[MemoryRow]]]] = WeakKeyDictionary()


def note_memory(job: Job, rows: Callable[[], Iterable[MemoryRow]]) -> None:
    """Let tables of ``job`` contain memory that is no state: pools, buffers on the way.

    Args:
        job: whose; the note ends with it.
        rows: answers what there is at the moment.
    """
    if job not in _noted:
        _noted[job] = []
        job.on_close(lambda: _noted.pop(job, None))
    _noted[job].append(rows)


def memory_table(engine: Engine) -> list[MemoryRow]:
    """What an engine keeps on this rank, and the buffers of its job; largest first.

    Sizes of states are those of their elements, without padding. What only lives during a pass
    (weights that are gathered, activations on the device, workspace) is not in it; the accelerator
    counts it. Reads no state, and does not communicate.
    """
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    for fragment in engine.states.fragments():
        numel = sum(box.numel for box in fragment.boxes)
        sizes[fragment.kind, fragment.home] += numel * fragment.dtype.itemsize
    rows = [MemoryRow(kind, place, nbytes) for (kind, place), nbytes in sizes.items()]
    for noted in _noted.get(engine.job, ()):
        rows += noted()
    return sorted((row for row in rows if row.nbytes or row.locked), key=lambda row: -row.nbytes)


def memory_text(rows: Sequence[MemoryRow]) -> str:
    """A table as text: a line for each kind, a column for each place, in MiB."""
    places = [*PLACES, *sorted({row.place for row in rows} - {*PLACES})]
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(places, 0))
    for row in (row for row in rows if row.nbytes):
        sizes[row.kind][row.place] += row.nbytes
        sizes["total"][row.place] += row.nbytes
    sizes["total"] = sizes.pop("total", dict.fromkeys(places, 0))
    width = max(map(len, sizes))
    lines = [f"{'MiB':{width}}" + "".join(f"{place:>12}" for place in places)]
    for kind, columns in sizes.items():
        lines.append(f"{kind:{width}}" + "".join(f"{columns[p] / _MIB:12,.2f}" for p in places))
    locked = sum(row.locked for row in rows)
    if locked:
        lines.append(f"page-locked: {locked / _MIB:,.2f} MiB of the host's")
    return "\n".join(lines)


class LogsMemory(Plugin):
    """A plugin of this package, where ``memory_breakdown`` logs tables."""

    @hookimpl(wrapper=True)
    def optimizer_step(self, engine: Engine) -> Generator[None, bool | None, bool | None]:
        applied = yield
        _log_memory(engine)
        return applied


def _log_memory(engine: Engine) -> None:
    """Log rank 0's table where ``memory_breakdown`` and ``steps_per_print`` ask for it.

    The step is not counted yet.
    """
    plan, step = engine.job.plan, engine.global_steps + 1
    every = plan.section(StepsPerPrint).root or 0
    if engine.job.rank or not plan.section(MemoryBreakdown).root or not every or step % every:
        return
    if _logged.get(engine) == step:
        return  # two plugins of this package are active
    _logged[engine] = step
    accelerator = engine.job.accelerator
    now, peak = accelerator.memory_allocated(), accelerator.max_memory_allocated()
    logger.info(
        "memory of rank 0 in step %d; the device holds %s MiB now, %s at most\n%s",
        step,
        f"{now / _MIB:,.2f}",
        f"{peak / _MIB:,.2f}",
        memory_text(memory_table(engine)),
    )


_logged: WeakKeyDictionary[Engine, int] = WeakKeyDictionary()
"""Engine -> the step whose table was logged last."""
