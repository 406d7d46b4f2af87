"""Where the bytes of a job would live, by kind and place, found by rehearsing it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drivetrain.precision.precision import Precision
from drivetrain.sections.optimization import OptimizerSection
from drivetrain.states.units import units
from drivetrain_cli.rehearsal import rehearsal
from drivetrain_cli.stand_in import Shape, StandIn, block_activations, model_of, without_memory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike
    from typing import Any

    from torch import nn

    from drivetrain.engine.engine import Engine

Row = tuple[str, str, int, int]
"""Kind, place, bytes, and how many of them are page-locked."""

PLACES = ("device", "host", "nvme")
ACTIVATIONS = "activations"
_FIRST = ("parameter", "gradient", "master")


@dataclass(frozen=True)
class Model:
    """What is known of a model.

    Args:
        module: of tensors on the device ``meta``.
        what: it in words.
        hidden: width of its blocks; ``None`` if unknown.
    """

    module: nn.Module
    what: str
    hidden: int | None

    @classmethod
    def of_size(cls, parameters: int, layers: int | None, hidden: int | None) -> Model:
        """A transformer with so many parameters.

        Raises:
            ConfigError: layers and hidden size do not fit.
        """
        shape = Shape.of(parameters, layers, hidden)
        module = without_memory(lambda: StandIn(shape), "a transformer of that size")
        how = ", a usual shape for this size" if shape.guessed else ""
        blocks = "1 block" if shape.layers == 1 else f"{shape.layers} blocks"
        what = f"{blocks} of hidden size {shape.hidden}{how}"
        return cls(module, f"{parameters:,} parameters ({what})", shape.hidden)

    @classmethod
    def made_by(cls, path: str, hidden: int | None) -> Model:
        """What ``MODULE:FUNCTION`` makes.

        Raises:
            ConfigError: it makes no model.
        """
        module = model_of(path)
        count = sum(parameter.numel() for parameter in module.parameters())
        return cls(module, f"{count:,} parameters ({path})", hidden)


@dataclass(frozen=True)
class Ranks:
    """How many processes there would be.

    Args:
        per_machine: on each machine.
        machines: number of machines.
        on_cpu: whether they compute on a CPU, whose memory is the host's.
    """

    per_machine: int
    machines: int
    on_cpu: bool


@dataclass(frozen=True)
class Forecast:
    """What one rank would need.

    Args:
        held: parameters, gradients, master weights and optimizer states, between two steps.
        buffers: all else, for which some kinds say "at most".
        notes: what was assumed, one sentence each.
    """

    held: Sequence[Row]
    buffers: Sequence[Row]
    notes: Sequence[str]

    def by_kind(self) -> Mapping[str, Mapping[str, int]]:
        """Kind -> bytes by place; ``"pinned"`` is a part of the host's."""
        found: dict[str, dict[str, int]] = {}
        for kind, place, nbytes, locked in sorted([*self.held, *self.buffers], key=_order):
            places = found.setdefault(kind, dict.fromkeys((*PLACES, "pinned"), 0))
            places[place] += nbytes
            places["pinned"] += locked
        return {kind: places for kind, places in found.items() if any(places.values())}


def forecast(
    config: Mapping[str, Any] | str | PathLike[str],
    model: Model,
    ranks: Ranks,
    *,
    sequence: int,
    overlays: Sequence[str] = (),
) -> Forecast:
    """Rehearse a job, and ask what it would hold.

    Args:
        config: as a job gets it.
        model: its module is changed in place.
        ranks: how many, and where.
        sequence: tokens of a sample, for activations.
        overlays: ``path=value`` assignments on top of the config.

    Raises:
        ConfigError: the config is not one that a job would run.
    """
    blocks = len(units(model.module))
    with rehearsal(
        config,
        model.module,
        ranks=ranks.per_machine * ranks.machines,
        ranks_on_host=ranks.per_machine,
        on_cpu=ranks.on_cpu,
        overlays=overlays,
    ) as engine:
        each, notes = _activations(engine, model, sequence)
        if engine.job.plan.section(OptimizerSection).type is None:
            notes.append(f"the config names no optimizer; {engine.get_type()} is assumed")
        added = engine.job.hub.memory_rows(engine, each, blocks)
        whole = [(ACTIVATIONS, "device", each * blocks, 0)]
        return Forecast(held_rows(engine), [*added, *whole], notes)


def held_rows(engine: Engine) -> list[Row]:
    """What a rehearsed engine keeps between two steps: parameters, gradients and states.

    On the device the memory that they lie in counts, once, with padding and with what is whole
    there although the rank's fragment is a part of it.
    """
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    counted: set[int] = set()
    for fragment in engine.states.fragments():
        if fragment.kind == "step":
            continue
        if fragment.home == "device":
            storage = fragment.read().untyped_storage()
            if storage._cdata not in counted:
                sizes[fragment.kind, "device"] += storage.nbytes()
            counted.add(storage._cdata)
        else:
            numel = sum(box.numel for box in fragment.boxes)
            sizes[fragment.kind, fragment.home] += numel * fragment.dtype.itemsize
    for parameter in engine.module.parameters():
        storage = parameter.data.untyped_storage()
        is_whole = storage.nbytes() >= parameter.data.nbytes  # else it is released
        if is_whole and storage._cdata not in counted:
            sizes["parameter", "device"] += storage.nbytes()
            counted.add(storage._cdata)
    return [(kind, place, nbytes, 0) for (kind, place), nbytes in sizes.items()]


def _order(row: Row) -> int:
    """Parameters, gradients and master weights first, then states, and buffers last."""
    return _FIRST.index(row[0]) if row[0] in _FIRST else len(_FIRST)


def _activations(engine: Engine, model: Model, sequence: int) -> tuple[int, list[str]]:
    """Bytes that a block saves of one micro-batch, and what they are."""
    if model.hidden is None:
        return 0, ["activations are not known; give --hidden for an estimate of a transformer's"]
    plan, precision = engine.job.plan, Precision.of(engine.job.plan)
    samples = 1 if plan.batch is None else plan.batch.micro_batch_size
    dtype = precision.lower or precision.parameter
    width = 4 if dtype is None else dtype.itemsize
    note = (
        f"activations are an estimate: what a transformer's blocks save of {samples} x {sequence} "
        "tokens, nothing recomputed, without logits and loss"
    )
    return block_activations(model.hidden, samples * sequence, width), [note]
