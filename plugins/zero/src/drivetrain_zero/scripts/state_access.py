"""Reading and writing single states of an engine, whatever keeps them: over fragments.

Values are those of the client's tensor. Every rank that shares the parameter, or has a part of it,
calls with the same one; ranks that have others (another pipeline stage) are not asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING
from zlib import crc32

import torch
from torch import nn

from drivetrain.contracts import Op, Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain.job.job import open_jobs
from drivetrain.job.ownership import owner_of

if TYPE_CHECKING:
    from drivetrain.contracts import Axis, Fragment, ParameterInfo
    from drivetrain.engine.engine import Engine

MASTER = "master"
GRADIENT = "gradient"

_NOT_STATES = (MASTER, GRADIENT, "parameter", "step")

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""[Note: absent elements] Ranks put their parts together as integers of which the largest counts.
Nothing is lost so, neither NaN nor the sign of zero, and replicas need not agree on who is the
owner. An element that a rank does not have is -0.0, whose bits are the smallest integer."""


class StateAccess:
    """One kind of states of some parameters of one engine.

    Args:
        parameters: of one engine, all trained.
        kind: :data:`MASTER` (the parameter itself where it is its own master), :data:`GRADIENT`,
            or an optimizer state's name.

    Raises:
        TrainingError: the parameters belong to no engine or to several.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], kind: str) -> None:
        engine = engine_of(parameters[0])
        own = {id(p) for p in engine.module.parameters()} if engine is not None else set()
        if engine is None or any(id(parameter) not in own for parameter in parameters):
            raise TrainingError(
                f"the {kind} of a parameter that belongs to no open engine was asked for: pass "
                "parameters of one engine's module"
            )
        self.engine = engine
        self._parts = [_Part(p, engine.job.parameters.info(p), kind) for p in parameters]
        self._kind = kind

    def read(self) -> list[torch.Tensor | None]:
        """Whole values, float32 or float64; ``None`` where no gradient is. Collective.

        Raises:
            TrainingError: no rank has such a state, a window is not complete, or other ranks read
                another parameter.
        """
        scale = self._scale()
        if scale is None:
            return [None] * len(self._parts)
        self._agree("read")
        whole = self._gathered(self._fragments())
        for part in self._parts:
            if whole[part] is None:
                raise TrainingError(f"parameter {part.info.name} has no {part.kind}{self._known()}")
        return [_scaled(whole[part], scale) for part in self._parts]

    def write(self, values: Sequence[torch.Tensor]) -> None:
        """Overwrite with whole values; those of the first rank that shares it. Collective.

        Raises:
            TrainingError: a shape is wrong, there is no gradient, a window is not complete, or
                other ranks write another parameter.
        """
        scale = self._scale()
        if scale is None:
            raise TrainingError("there is no gradient yet in this window that could be overwritten")
        self._agree("written")
        fragments = self._fragments()
        for part, given in zip(self._parts, values, strict=True):
            if given.shape != part.info.whole_shape:
                raise TrainingError(
                    f"the {part.kind} of parameter {part.info.name} has shape "
                    f"{part.info.whole_shape}, got a value of shape {tuple(given.shape)}"
                )
            value = given.detach().to(self.engine.device, part.dtype, copy=True).contiguous()
            tag = Tag(Purpose.STATE, part.info.name, f"set {part.kind}")
            replicated = self.engine.job.parameters.replicated(part.info)
            for axis in (*part.axes[::-1], replicated):
                self.engine.job.communicator.broadcast(value, axis, tag)
            for fragment in self._followers(fragments, part):
                _put(fragment, value / scale)
        self._written()

    def read_local(self) -> list[torch.Tensor | None]:
        """What this rank keeps, flat."""
        scale, fragments = self._scale(), self._fragments()
        if scale is None:
            return [None] * len(self._parts)
        return [_scaled(_flat(fragments[p.key], p.dtype), scale) for p in self._parts]

    def write_local(self, values: Sequence[torch.Tensor]) -> None:
        """Overwrite what this rank keeps. Collective.

        Raises:
            TrainingError: a length is wrong, there is no gradient, or a window is not complete.
        """
        scale, fragments = self._scale(), self._fragments()
        if scale is None:
            raise TrainingError("there is no gradient yet in this window that could be overwritten")
        for part, given in zip(self._parts, values, strict=True):
            have = fragments[part.key]
            lengths = [sum(box.numel for box in fragment.boxes) for fragment in have]
            if given.numel() != sum(lengths):
                raise TrainingError(
                    f"this rank keeps {sum(lengths)} elements of the {part.kind} of parameter "
                    f"{part.info.name}, got {given.numel()}"
                )
            pieces = torch.split(given.detach().reshape(-1) / scale, lengths)
            for group in {part.key, part.follower}:
                for fragment, piece in zip(fragments[group], pieces, strict=True):
                    fragment.write(piece.to(fragment.dtype))
        self._written()

    # -- internals ----------------------------------------------------------------------------

    def _agree(self, what: str) -> None:
        """Check that all ranks that have parts or copies ask for the same. Collective.

        Stages of a pipeline meet at the parameters that they share alone, perhaps each in an order
        of its own; values of one of them would end in another.
        """
        together: dict[tuple[Axis, ...], list[str]] = defaultdict(list)
        for part in self._parts:
            copies = self.engine.job.parameters.replicated(part.info)
            together[*part.axes, copies].append(part.info.name)
        for axes, names in together.items():
            own = crc32(repr((what, self._kind, names)).encode())
            ends = torch.tensor([own, -own])
            for axis in axes:
                tag = Tag(Purpose.CONTROL, names[0], f"{self._kind} to be {what}")
                self.engine.job.communicator.all_reduce(ends, axis, tag, op=Op.MAX)
            if ends[0] != -ends[1]:
                raise TrainingError(
                    f"the {self._kind} of parameter {names[0]} is to be {what} on this rank, and "
                    "something else on another one that shares it: all ranks that share parameters "
                    "have to call for the same ones, in the same order"
                )

    def _scale(self) -> float | None:
        """What stored numbers are multiplied by to be what users mean; ``None``: no gradients."""
        engine = self.engine
        if self._kind != GRADIENT:
            engine.states.flush()
            return 1.0
        if not engine.is_gradient_accumulation_boundary():
            raise TrainingError(
                "gradients are summed over ranks in the last micro-batch of a window: read and "
                f"write them after its backward, not in micro-step {engine.micro_steps}"
            )
        factor = engine.states.complete_gradients()
        if factor is None:
            return None
        return factor / (engine.loss_scaler.scale_value * float(engine.gradient_divisor()))

    def _fragments(self) -> dict[tuple[str, str], list[Fragment]]:
        wanted = {key for part in self._parts for key in (part.key, part.follower)}
        found: dict[tuple[str, str], list[Fragment]] = defaultdict(list)
        for fragment in self.engine.states.fragments():
            key = (fragment.name, fragment.kind)
            if key in wanted and fragment.on_reshape == "redistribute":
                found[key].append(fragment)
        return found

    def _followers(
        self, fragments: dict[tuple[str, str], list[Fragment]], part: _Part
    ) -> list[Fragment]:
        keys = dict.fromkeys((part.key, part.follower))
        return [fragment for key in keys for fragment in fragments[key]]

    def _gathered(
        self, fragments: dict[tuple[str, str], list[Fragment]]
    ) -> dict[_Part, torch.Tensor | None]:
        together: dict[tuple[tuple[Axis, ...], torch.dtype], list[_Part]] = defaultdict(list)
        for part in self._parts:
            together[part.axes, part.dtype].append(part)
        found: dict[_Part, torch.Tensor | None] = {}
        for (axes, dtype), parts in together.items():
            sizes = [prod(part.info.whole_shape) + 1 for part in parts]  # one says that it is there
            flat = torch.full((sum(sizes),), -0.0, dtype=dtype, device=self.engine.device)
            slots = torch.split(flat, sizes)
            for part, slot in zip(parts, slots, strict=True):
                for fragment in fragments[part.key]:
                    _take(fragment, slot[:-1].view(part.info.whole_shape))
                    slot[-1] = 1.0
            tag = Tag(Purpose.STATE, parts[0].info.name, f"get {self._kind}")
            for axis in axes:
                bits = flat.view(_BITS[dtype])
                self.engine.job.communicator.all_reduce(bits, axis, tag, op=Op.MAX)
            for part, slot in zip(parts, slots, strict=True):
                there = float(slot[-1]) == 1.0
                found[part] = slot[:-1].view(part.info.whole_shape) if there else None
        return found

    def _known(self) -> str:
        kinds = {fragment.kind for fragment in self.engine.states.fragments()}
        names = ", ".join(sorted(kinds.difference(_NOT_STATES)))
        return f"; its engine keeps {names}" if names else ""

    def _written(self) -> None:
        if self._kind == MASTER:
            self.engine.states.fragments_written([part.parameter for part in self._parts])


@dataclass(frozen=True, eq=False)
class _Part:
    """One parameter's state."""

    parameter: nn.Parameter
    info: ParameterInfo
    kind: str

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Axes along which ranks have it, or parts of it."""
        placement = self.info.placement
        return (self.info.reduction, *(() if placement is None else (placement.axis,)))

    @property
    def key(self) -> tuple[str, str]:
        """Name and kind of the fragments that hold it."""
        own_master = self.info.master_dtype in (None, self.info.compute_dtype)
        kind = "parameter" if self.kind == MASTER and own_master else self.kind
        return self.info.name, kind

    @property
    def follower(self) -> tuple[str, str]:
        """Name and kind of fragments that get the same values."""
        return (self.info.name, "parameter") if self.kind == MASTER else self.key

    @property
    def dtype(self) -> torch.dtype:
        """In which it is handed to users."""
        return torch.float64 if self.parameter.dtype == torch.float64 else torch.float32


def engine_of(parameter: nn.Parameter) -> Engine | None:
    """The engine that keeps ``parameter``, else the newest open one that has it in its module."""
    owner = owner_of(parameter)
    for job in reversed(open_jobs()):
        if owner is not None and owner.job is job:
            return job.engines[owner.number]
        if owner is None and parameter in job.parameters:
            for engine in reversed(job.engines):
                if any(own is parameter for own in engine.module.parameters()):
                    return engine
    return None


def is_trained(parameter: nn.Parameter) -> bool:
    """Whether an engine updates ``parameter``."""
    engine = engine_of(parameter)
    if engine is None or engine.optimizer is None or not parameter.requires_grad:
        return False
    groups = engine.optimizer.param_groups
    return any(own is parameter for group in groups for own in group["params"])


def _scaled(values: torch.Tensor | None, scale: float) -> torch.Tensor | None:
    return values if values is None or scale == 1.0 else values * scale


def _flat(fragments: Sequence[Fragment], dtype: torch.dtype) -> torch.Tensor:
    parts = [box.of_storage(f.read()).reshape(-1) for f in fragments for box in f.boxes]
    return torch.cat([part.to(dtype) for part in parts]) if parts else torch.empty(0, dtype=dtype)


def _take(fragment: Fragment, whole: torch.Tensor) -> None:
    """Copy what ``fragment`` holds to its places in the whole tensor."""
    stored = fragment.read()
    for box in fragment.boxes:
        box.of(whole).copy_(box.of_storage(stored))


def _put(fragment: Fragment, whole: torch.Tensor) -> None:
    """Overwrite what ``fragment`` holds with its places of the whole tensor."""
    stored = fragment.read().detach().clone()
    for box in fragment.boxes:
        box.of_storage(stored).copy_(box.of(whole))
    fragment.write(stored)
