"""A model of repeated units, of which a rank runs one run of units at a time.

On every stage the model's own forward runs, from the inputs of the micro-batch:

- parts before this chunk are stand-ins, which return zeros of the right shapes; what the model
  computes from the inputs alone (masks, positions) is right on every stage;
- the first unit of the chunk gets the arguments that the chunk before has made, in place of
  those that stand-ins have; so do all units after it, where they get the same tensors;
- the call of the first unit behind the chunk ends the forward: its arguments are what is sent;
- behind the last unit the forward goes on to its end: norm, head and loss.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from drivetrain.errors import TrainingError
from drivetrain_pipeline.running.chunked import Around
from drivetrain_pipeline.splitting import gates
from drivetrain_pipeline.splitting.order import Order, Part
from drivetrain_pipeline.splitting.stand_in import StandIn, drop_tensors, dropped_tensors
from drivetrain_pipeline.splitting.tracking import Tracking

Values = dict[str, torch.Tensor]
"""What one chunk hands to the next: place among the arguments of a unit -> tensor."""


@dataclass(eq=False)
class _Call:
    """One forward of one chunk."""

    chunk: int
    begin: int
    end: int
    received: Values
    tracking: Tracking | None = None
    places: list[str] = field(default_factory=list)
    """What is sent, where that is known already."""

    next: int = 0
    put: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Identity of a tensor of this forward -> itself, and what takes its place."""


class _Reached(BaseException):
    """The first unit behind a chunk was called; no handler of the model is to catch it."""

    def __init__(self, call: _Call, values: Values) -> None:
        super().__init__("the end of a chunk")
        self.call = call
        self.values = values


class SplitModel:
    """Runs the chunks of this rank, one at a time.

    Args:
        model: the client's; its forward is replaced, and parts of other ranks lose their tensors.
        order: its parts.
        bounds: first unit of each chunk, and the number of units.
        own: numbers of this rank's chunks.
        placement: stage of each chunk.
        device: where the model computes.
        dtypes: of floating parameters and buffers in the job; ``None``: their own.

    Attributes:
        holders: stages that have each parameter of this rank.
        own_parts: parts that no other stage has.
    """

    needs_inputs = True
    """Every chunk runs the model's forward from its inputs."""

    def __init__(
        self,
        model: nn.Module,
        order: Order,
        bounds: Sequence[int],
        own: Sequence[int],
        placement: Sequence[int],
        device: torch.device,
        dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
    ) -> None:
        self._model = model
        self._order = order
        self._bounds = tuple(bounds)
        self._own = tuple(own)
        self._forward = model.forward
        self._device = device
        self._call: _Call | None = None
        self._sent: dict[Any, list[str]] = {}
        self._gated: list[nn.Module] = []
        self.holders = self._find_holders(placement)
        self.own_parts: list[nn.Module] = []
        for part in (*order.units, *order.sides):
            stand_in = StandIn(part.name, part.module, type(part.module).forward)
            if not any(self._has(chunk, part) for chunk in own):
                drop_tensors(part.module, device, *dtypes)
            elif len({placement[c] for c in range(self.chunks) if self._has(c, part)}) == 1:
                self.own_parts.append(part.module)
            gates.install(part.module, partial(self._enter, part, stand_in))
            self._gated.append(part.module)

        @wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(args, kwargs)

        vars(model)["forward"] = forward

    @property
    def chunks(self) -> int:
        """Number of chunks of the whole model."""
        return len(self._bounds) - 1

    def begin(
        self, chunk: int, received: Any, labels: Any = None, *, with_loss: bool = True
    ) -> None:
        """Say what the next forward of the model is of.

        Args:
            chunk: one of this rank's.
            received: what the chunk before has returned; ``None`` for the first.
            labels: not looked at; the model's inputs have them.
            with_loss: not looked at either; the model decides by its inputs.
        """
        begin, end = self._bounds[chunk], self._bounds[chunk + 1]
        self._call = _Call(chunk, begin, end, dict(received or {}))

    def inputs(
        self, batch: Any, *, with_loss: bool = True
    ) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Take a micro-batch apart, as one process would hand it to the model."""
        if isinstance(batch, Mapping):
            return (), dict(batch), None
        return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}, None

    def partitions(self) -> list[int]:
        """The first unit of each chunk, and the number of units."""
        return list(self._bounds)

    def layers_by_name(self) -> dict[str, nn.Module | None]:
        """All units, in order; ``None`` for those of other stages."""
        return {
            part.name: part.module if any(self._has(c, part) for c in self._own) else None
            for part in self._order.units
        }

    def watch_calls(self, around: Around | None) -> None:
        """Without effect: all units are modules, and the rest is the model's own forward."""

    def restore(self) -> None:
        """Take gates and forward away again."""
        vars(self._model).pop("forward", None)
        for module in self._gated:
            gates.remove(module)

    def _has(self, chunk: int, part: Part) -> bool:
        begin, end = self._bounds[chunk], self._bounds[chunk + 1]
        if part.unit is not None:
            return begin <= part.unit < end
        return any(begin < place <= end or place == begin == 0 for place in part.positions)

    def _find_holders(self, placement: Sequence[int]) -> MutableMapping[nn.Parameter, set[int]]:
        """The stages that have each parameter; those of the spine itself are on all of them."""
        found: MutableMapping[nn.Parameter, set[int]] = WeakTensorKeyDictionary()
        for part in (*self._order.units, *self._order.sides):
            stages = {placement[c] for c in range(self.chunks) if self._has(c, part)}
            for parameter in part.module.parameters():
                found.setdefault(parameter, set()).update(stages)
        for module in self._order.spine.values():
            for parameter in module.parameters(recurse=False):
                found.setdefault(parameter, set()).update(placement)
        return found

    # -- one forward --------------------------------------------------------------------------

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._call
        if call is None:
            raise TrainingError(
                "this model is one stage of a pipeline, which runs whole batches: call "
                "engine.train_batch(batches) or engine.eval_batch(batches)"
            )
        kind = self._kind(call, args, kwargs)
        call.places = self._sent.get(kind, [])
        call.tracking = tracking = None if kind in self._sent else Tracking()
        try:
            with nullcontext() if tracking is None else tracking:
                if tracking is not None:
                    spine = self._order.spine.values()
                    tracking.note_made([[*part.parameters(recurse=False)] for part in spine])
                    tracking.note_made(call.received)
                    for part in (*self._order.units, *self._order.sides):
                        tracking.note_made([*part.module.parameters()])
                        tracking.note_unknown(dropped_tensors(part.module))
                try:
                    output = self._forward(*args, **kwargs)
                except _Reached as reached:
                    if reached.call is not call:
                        raise
                    output = reached.values
                    self._sent.setdefault(kind, list(output))
                else:
                    self._check_end(call, output)
                    self._sent.setdefault(kind, [])
            self._check_reads(call)
            return output
        finally:
            self._call = None

    def _kind(self, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What decides which values are sent; shapes do not."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        leaf_kinds = tuple(
            (leaf.dtype, leaf.dim()) if isinstance(leaf, torch.Tensor) else type(leaf)
            for leaf in leaves
        )
        return call.chunk, spec, leaf_kinds, self._model.training, torch.is_grad_enabled()

    def _check_end(self, call: _Call, output: Any) -> None:
        if call.end < len(self._order.units):
            behind = self._order.units[call.end].name
            raise TrainingError(
                f"pipeline: the model's forward ended without calling unit {behind}, at which this "
                "stage ends"
            )
        if call.next < call.end:
            raise TrainingError(
                f"pipeline: the model's forward ended without calling unit "
                f"{self._order.units[call.next].name}; units are to run once each, in their order"
            )
        if call.tracking is None:
            return
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        values = output if loss is None else loss
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, torch.Tensor) and call.tracking.is_unknown(leaf):
                raise TrainingError(
                    f"pipeline: what the model returns depends on values of earlier stages that "
                    f"do not come through the arguments of unit "
                    f"{self._order.units[call.begin].name}, so it cannot be split there"
                )

    def _check_reads(self, call: _Call) -> None:
        if call.tracking is not None and call.tracking.read:
            raise TrainingError(
                "pipeline: the model's forward decides by values of parts that are on another "
                "stage, so it cannot be split"
            )

    # -- one part -----------------------------------------------------------------------------

    def _enter(
        self,
        part: Part,
        stand_in: StandIn,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        run: gates.Run,
    ) -> Any:
        call = self._call
        if call is None:
            return run(*args, **kwargs)
        is_own = (
            self._enter_unit(part, call, args, kwargs)
            if part.unit is not None
            else (self._enter_side(part, call))
        )
        if not is_own:
            output = stand_in(args, kwargs, self._device)
            if call.tracking is not None:
                call.tracking.note_unknown(output)
            return output
        args, kwargs = self._put(part, call, args, kwargs)
        output = run(*args, **kwargs)
        if call.tracking is not None:
            call.tracking.note_made(output)
        return output

    def _enter_unit(
        self, part: Part, call: _Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Note that a unit is called; return whether this chunk runs it."""
        units = self._order.units
        if part.unit != call.next or call.next >= len(units):
            expected = units[call.next].name if call.next < len(units) else "the end"
            raise TrainingError(
                f"pipeline: unit {part.name} was called where {expected} was expected: units are "
                "to run once each, in their order (is the model configured to skip layers?)"
            )
        if call.next == call.end:
            raise _Reached(call, self._to_send(part, call, args, kwargs))
        call.next += 1
        if part.unit == call.begin and call.chunk:
            self._take(part, call, args, kwargs)
        return part.unit >= call.begin

    def _enter_side(self, part: Part, call: _Call) -> bool:
        before = call.next < call.begin or (call.next == call.begin and call.begin > 0)
        has = self._has(call.chunk, part)
        fits = any(place <= call.begin for place in part.positions) if before else has
        if not fits:
            near = self._order.units[min(call.next, len(self._order.units) - 1)].name
            raise TrainingError(
                f"pipeline: {part.name} is called near unit {near}, and the order in the model's "
                "forward did not tell so; give its place in the config, as pipeline.place: "
                f'{{"{part.name}": "first" or "last"}}'
            )
        return not before

    def _take(
        self, part: Part, call: _Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Let received values take the place of arguments of the chunk's first unit."""
        left = dict(call.received)
        for place, leaf in _leaves(args, kwargs):
            if place in left and isinstance(leaf, torch.Tensor):
                call.put[id(leaf)] = leaf, left.pop(place)
        if left:
            raise TrainingError(
                f"pipeline: unit {part.name} has no tensor at {next(iter(left))} of its arguments, "
                "where the stage before has sent one; do all stages get the same batches?"
            )

    def _put(
        self, part: Part, call: _Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not call.chunk:
            return args, dict(kwargs)

        def other(leaf: torch.Tensor) -> torch.Tensor:
            if id(leaf) in call.put:
                return call.put[id(leaf)][1]
            self._check_known(part, call, leaf)
            return leaf

        changed: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
            torch.Tensor, other, (args, dict(kwargs))
        )
        return changed

    def _check_known(self, part: Part, call: _Call, leaf: torch.Tensor) -> None:
        if call.tracking is not None and call.tracking.is_unknown(leaf):
            raise TrainingError(
                f"pipeline: {part.name} takes a value of an earlier stage that is no argument of "
                f"unit {self._order.units[call.begin].name}, the first of its stage, so the model "
                "cannot be split there"
            )

    def _to_send(
        self, part: Part, call: _Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Values:
        args, kwargs = self._put(part, call, args, kwargs)
        found = {p: leaf for p, leaf in _leaves(args, kwargs) if isinstance(leaf, torch.Tensor)}
        tracking = call.tracking
        if tracking is not None:
            return {place: tensor for place, tensor in found.items() if tracking.is_made(tensor)}
        lacking = next((place for place in call.places if place not in found), None)
        if lacking is not None:
            raise TrainingError(
                f"pipeline: unit {part.name} has no tensor at {lacking} of its arguments, where it "
                "had one for an earlier micro-batch with the same inputs"
            )
        return {place: found[place] for place in call.places}


def _leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        (pytree.keystr(path), leaf)
        for path, leaf in pytree.tree_flatten_with_path((args, dict(kwargs)))[0]
    ]
