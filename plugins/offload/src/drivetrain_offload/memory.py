"""Where the bytes of an engine live: by kind and by place."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from drivetrain.contracts import Plugin, hookimpl
from drivetrain.sections.observability import MemoryBreakdown, StepsPerPrint

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job

logger = logging.getLogger("drivetrain.offload")

PLACES = ("device", "host", "nvme")
"""Columns of a table; where a device is the host, its memory is ``"device"``."""

_LOCKED = "pinned"
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
        rows: returns what there is at the moment.
    """
    if job not in _noted:
        _noted[job] = []
        job.on_close(lambda: _noted.pop(job, None))
    _noted[job].append(rows)


def noted_memory(job: Job) -> list[MemoryRow]:
    """What :func:`note_memory` was told of, as it is now."""
    return [row for rows in _noted.get(job, ()) for row in rows()]


def memory_table(engine: Engine) -> list[MemoryRow]:
    """What an engine keeps on this rank, and the buffers of its job; largest first.

    Sizes of states are those of their elements, without padding; parameters that are whole on the
    device count as a whole. What only lives during a pass (weights that are gathered, activations
    on the device, workspace) is not in it; the accelerator counts it. Copies nothing and does not
    communicate.
    """
    from drivetrain_offload.on_demand.suspended import suspended

    sizes: dict[tuple[str, str], int] = defaultdict(int)
    locked: dict[tuple[str, str], int] = defaultdict(int)
    shards: dict[str, tuple[int, int]] = {}  # parameter -> storage and bytes of this rank's part
    for fragment in engine.states.fragments():
        key = fragment.kind, fragment.home
        nbytes = sum(box.numel for box in fragment.boxes) * fragment.dtype.itemsize
        sizes[key] += nbytes
        if key == ("parameter", "device") and nbytes:
            shards[fragment.name] = fragment.read().untyped_storage()._cdata, nbytes
    if (states := suspended(engine)) is not None:
        for kind, nbytes in states.locked_bytes().items():
            locked[kind, "host"] += nbytes
    sizes["parameter", "device"] += _whole_beside(engine, shards)
    for row in noted_memory(engine.job):
        sizes[row.kind, row.place] += row.nbytes
        locked[row.kind, row.place] += row.locked
    rows = [MemoryRow(*key, nbytes, locked[key]) for key, nbytes in sizes.items()]
    return sorted((row for row in rows if row.nbytes or row.locked), key=lambda row: -row.nbytes)


def _whole_beside(engine: Engine, shards: Mapping[str, tuple[int, int]]) -> int:
    """Bytes of the parameters that are whole on the device, without the shards that they show."""
    total = 0
    for parameter in engine.module.parameters():
        values = parameter.data
        storage = values.untyped_storage()
        is_whole = storage.nbytes() >= values.nbytes > 0  # one that is released shows a number
        if is_whole and values.device == engine.device:
            name = engine.job.parameters.info(parameter).name
            place, nbytes = shards.get(name, (0, 0))
            total += values.nbytes - (nbytes if place == storage._cdata else 0)
    return total


def memory_text(rows: Sequence[MemoryRow]) -> str:
    """A table as text: a line for each kind, a column for each place, in MiB.

    What is page-locked stands in a column of its own, and counts as host memory, too.
    """
    places = [*PLACES, *sorted({row.place for row in rows} - {*PLACES})]
    if any(row.locked for row in rows):
        places.insert(places.index("host") + 1, _LOCKED)
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(places, 0))
    for row in (row for row in rows if row.nbytes or row.locked):
        for kind in (row.kind, "total"):
            sizes[kind][row.place] += row.nbytes
            sizes[kind][_LOCKED] = sizes[kind].get(_LOCKED, 0) + row.locked
    sizes["total"] = sizes.pop("total", dict.fromkeys(places, 0))
    width = max(map(len, sizes))
    lines = [f"{'MiB':{width}}" + "".join(f"{place:>12}" for place in places)]
    for kind, columns in sizes.items():
        lines.append(f"{kind:{width}}" + "".join(f"{columns[p] / _MIB:12,.2f}" for p in places))
    return "\n".join(lines)


class LogsMemory(Plugin):
    """Base of this package's plugins: logs tables of memory where ``memory_breakdown`` is set."""

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
