"""When gradients are ready, and in which order their buckets are reduced.

[Note: gradient readiness] A parameter may receive several accumulations in one backward
(re-entrant checkpointing, tiled compute, several backward calls) or none that autograd's hooks see
(split backward, unused parameters). So:

- each accumulation is moved from ``.grad`` into its bucket at once, and ``.grad`` is cleared;
- a bucket is reduced when all of its parameters have been seen, in one fixed order on all ranks;
- an accumulation that arrives after its bucket was sent is *late*: it is kept aside, and reduced in
  a second reduction at the end of the window. It is never lost. From then on that bucket waits for
  the end of the window, so the second reduction is paid once;
- whatever was not seen by the end of the window counts as zero.

Where every backward is reduced, each one is a *round*: what is late in one takes part in the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.contracts.world.collective import Op, Purpose, Tag
from drivetrain.contracts.world.communicator import Communicator
from drivetrain.errors import TrainingError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from drivetrain.contracts.state.model_states import GradientFilter, GradientWatch
    from drivetrain.contracts.world.axis import Axis


@dataclass(slots=True, weakref_slot=True, eq=False)
class Slot:
    """One parameter's place in a bucket.

    Args:
        name: of the parameter.
        parameter: whose gradient it takes.
        index: which of the bucket's parameters it is.
        bucket: where it belongs.
        filled: the bucket holds a gradient of it that is not sent yet.
        seen: a gradient arrived since reduction became possible.
        used: a gradient arrived in this window.
        arrived: a gradient arrived in this micro-batch.
        deferred: hooks are ignored until :meth:`GradientReducer.gradients_ready`.
        late: what arrived after the bucket was sent.
        place: what the parameter shows, in its bucket's memory; ``None`` where that comes and goes.
        dtype: of the parameter.
        version: torch's count of changes in place when states last knew the parameter's values.
    """

    name: str
    parameter: nn.Parameter
    index: int
    bucket: GradientBucket
    filled: bool = False
    seen: bool = False
    used: bool = False
    arrived: bool = False
    deferred: bool = False
    late: torch.Tensor | None = None
    place: torch.Tensor | None = None
    dtype: torch.dtype = field(init=False)
    version: int = field(init=False)

    def __post_init__(self) -> None:
        self.note()

    def note(self) -> None:
        """The states know the parameter as it is now."""
        self.dtype, self.version = self.parameter.dtype, self.parameter._version

    @property
    def is_moved(self) -> bool:
        """Whether the parameter shows something else than its place."""
        parameter, place = self.parameter, self.place
        return place is not None and (
            parameter.data_ptr() != place.data_ptr()
            or parameter.shape != place.shape
            or not parameter.is_contiguous()
        )

    @property
    def is_changed(self) -> bool:
        """Whether a script has changed the parameter; ``.data`` changed in place is not seen."""
        counted = self.place is not None and self.parameter._version != self.version
        return counted or self.parameter.dtype is not self.dtype or self.is_moved

    @property
    def shows_the_same(self) -> bool:
        """Whether the parameter only shows the same values elsewhere."""
        counted = self.parameter._version != self.version
        return not counted and self.place is not None and torch.equal(self.parameter, self.place)

    def take_over(self) -> None:
        """Copy what the parameter shows to its place, and let it show that again."""
        if self.is_moved:
            assert self.place is not None
            self.place.copy_(self.parameter.detach().clone())  # it may be a view of the place
            self.parameter.data = self.place
        self.note()


@dataclass(eq=False)
class GradientBucket(ABC):
    """The gradients of some parameters, which are reduced together.

    Args:
        key: names it in collectives.
        reduction: axes that gradients are summed over.
        replicated: further axes along which ranks have equal parameters.
        slots: its parameters.
        reduced: false where the update rule communicates gradients by itself.
        wait_for_end: whether it is sent at the end of the window only.
        missing: parameters that have not been seen.
        passed: backward is beyond it on all ranks.
        sent: whether its reduction has begun.
        changed: whether a script has changed one of its parameters, on this rank or another.
    """

    key: str
    reduction: Axis
    replicated: tuple[str, ...] = ()
    wait_for_end: bool = False
    slots: list[Slot] = field(default_factory=list)
    reduced: bool = True
    missing: int = 0
    passed: bool = False
    sent: bool = False
    changed: bool = False

    @abstractmethod
    def add(self, slot: Slot, gradient: torch.Tensor) -> None:
        """Take a gradient of ``slot``; it replaces what is there unless the slot is filled."""

    @abstractmethod
    def unsent(self, slot: Slot) -> torch.Tensor:
        """What was added of ``slot``, which is filled, and has not been sent; a view."""

    @abstractmethod
    def send(self) -> None:
        """Begin the reduction; slots that are not filled count as zero."""

    @abstractmethod
    def collect(self) -> None:
        """Return once what was sent is reduced and kept. Without anything sent, do nothing."""

    @abstractmethod
    def add_late(self) -> None:
        """Reduce what arrived since :meth:`send`, on any rank, and add it to what is kept."""

    @property
    def has_late(self) -> bool:
        """Whether this rank has gradients that no reduction has taken along."""
        return any(s.late is not None or (s.filled and not self.sent) for s in self.slots)

    def restart(self) -> None:
        """Forget the window's gradients."""
        self.missing, self.passed, self.sent = len(self.slots), False, False
        for slot in self.slots:
            slot.filled = slot.seen = slot.used = False
            slot.late = None

    def begin_round(self) -> None:
        """Make ready for another backward; late gradients take part in its reduction."""
        self.missing, self.passed, self.sent = len(self.slots), False, False
        for slot in self.slots:
            slot.filled = slot.seen = False
        for slot in self.slots:
            if slot.late is not None:
                self.add(slot, slot.late)
                slot.filled, slot.late = True, None


class GradientReducer:
    """Fills buckets from autograd hooks and has them reduced.

    Args:
        buckets: in the order in which they are reduced on every rank.
        communicator: carries the agreement on late gradients.
        every_backward: reduce each backward by itself, not the sum of a window.
        watches: shown each parameter's gradient before it is sent.
        filters: given each gradient as it arrives.

    Attributes:
        reduce_now: whether gradients that arrive now may be reduced.
        last: whether gradients that arrive now are the last of their parameters in this window.
        weighted: whether the window's losses have weights; ranks agree on it in :meth:`finish`.
        in_turn: buckets are reduced when :meth:`passed` says so, not when their gradients are
            there: between other collectives that ranks have to issue in one order.
    """

    def __init__(
        self,
        buckets: Sequence[GradientBucket],
        communicator: Communicator,
        *,
        every_backward: bool = False,
        watches: Sequence[GradientWatch] = (),
        filters: Sequence[GradientFilter] = (),
    ) -> None:
        self.reduce_now = self.last = False
        self.weighted: bool | None = None
        self.in_turn = False
        self.buckets = buckets
        self.slots = {slot.parameter: slot for bucket in buckets for slot in bucket.slots}
        self._communicator = communicator
        self._every_backward = every_backward
        self._watches, self._filters = watches, filters
        self._between_rounds = False
        self._next = 0
        self._hooks: list[RemovableHandle] = []
        self._always_wait = {bucket.key for bucket in buckets if bucket.wait_for_end}
        for slot in self.slots.values():
            parameter: Any = slot.parameter  # torch does not type the method
            hook = parameter.register_post_accumulate_grad_hook(
                lambda _parameter, slot=slot: None if slot.deferred else self._take(slot)
            )
            self._hooks.append(hook)

    # -- during backward ----------------------------------------------------------------------

    def begin_backward(self, *, last: bool, local: bool) -> None:
        """See :class:`~drivetrain.contracts.state.model_states.ModelStates`."""
        self.last = last
        # What is deferred would be late in every round, so there is one for the whole window.
        rounds = self._every_backward and not self._is_deferring
        self.reduce_now = not local and (last or rounds)

    def gradients_ready(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take ``.grad`` of parameters that hooks did not report, and end their deferral."""
        for parameter in parameters:
            slot = self.slots[parameter]
            slot.deferred = False
            self._take(slot)

    def defer(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leave the gradients of ``parameters`` in ``.grad`` until :meth:`gradients_ready`."""
        for parameter in parameters:
            self.slots[parameter].deferred = True

    def added(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """See :class:`~drivetrain.contracts.state.model_states.ModelStates`."""
        slot = self.slots[parameter]
        is_open = slot.filled and not slot.bucket.sent and not self._filters
        return slot.bucket.unsent(slot) if is_open else None

    def take_set(self, *, unscaled: bool) -> None:
        """Take what a script has assigned to ``.grad`` as this rank's gradients of a micro-batch.

        They join the second reduction, since other ranks may have sent their buckets already.

        Args:
            unscaled: nothing tells that these gradients are of a scaled loss, as all others are.

        Raises:
            TrainingError: backward gave a gradient, too, or losses are scaled.
        """
        for slot in self.slots.values():
            if slot.parameter.grad is not None and not slot.deferred:
                if slot.arrived or unscaled:
                    raise TrainingError(_why_not_set(slot))
                gradient = self._filtered(slot.parameter, slot.parameter.grad.detach())
                slot.parameter.grad = None
                slot.late = gradient if slot.late is None else slot.late + gradient
                slot.used = True
            slot.arrived = False

    def _take(self, slot: Slot) -> None:
        gradient, slot.parameter.grad = slot.parameter.grad, None
        bucket = slot.bucket
        if gradient is not None:
            slot.used = slot.arrived = True
            if gradient.requires_grad:  # it has a graph after backward(create_graph=True)
                gradient = gradient.detach()
            gradient = self._filtered(slot.parameter, gradient)
            if bucket.sent:
                slot.late = gradient if slot.late is None else slot.late + gradient
                return
            bucket.add(slot, gradient)
            slot.filled, self._between_rounds = True, False
        if self.reduce_now and not slot.seen:
            slot.seen = True
            bucket.missing -= 1
            if not bucket.missing:
                self._send_in_order()

    def _filtered(self, parameter: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
        for receive in self._filters:
            gradient = receive(parameter, gradient)
        return gradient

    def passed(self, buckets: Iterable[GradientBucket]) -> None:
        """Backward is beyond ``buckets`` on all ranks: what they lack counts as zero."""
        if not self.reduce_now:
            return
        for bucket in buckets:
            self._end(bucket)
        self._send_in_order()

    def _end(self, bucket: GradientBucket) -> None:
        if not any(slot.deferred for slot in bucket.slots):
            bucket.missing, bucket.passed = 0, True
            for slot in bucket.slots:
                slot.seen = True

    def _send_in_order(self) -> None:
        while self._next < len(self.buckets):
            bucket = self.buckets[self._next]
            if bucket.missing or bucket.wait_for_end or (self.in_turn and not bucket.passed):
                return
            self._send(bucket)

    def _send(self, bucket: GradientBucket) -> None:
        self._show(bucket)
        bucket.sent = True
        bucket.send()
        self._next += 1

    def _show(self, bucket: GradientBucket) -> None:
        """Let watches see what is about to be sent of ``bucket``."""
        for watch in self._watches:
            for slot in bucket.slots:
                if slot.filled and not bucket.sent:
                    watch(slot.parameter, bucket.unsent(slot))
                if slot.late is not None:
                    watch(slot.parameter, slot.late)

    def end_backward(self) -> None:
        """Reduce what nothing will be added to: all of the round, where each backward is one."""
        if not self.reduce_now:
            return
        if self._every_backward and not self._is_deferring:
            for bucket in self.buckets[self._next :]:
                self._send(bucket)
            self._begin_round()
            return
        for bucket in self.buckets:
            self._end(bucket)
        self._send_in_order()

    @property
    def _is_deferring(self) -> bool:
        return any(slot.deferred for slot in self.slots.values())

    def _begin_round(self) -> None:
        self._next, self._between_rounds = 0, True
        for bucket in self.buckets:
            bucket.begin_round()

    # -- at the boundary ----------------------------------------------------------------------

    def finish(self, *, dropping: bool = False) -> None:
        """Reduce what is left, wait for all, then reduce late gradients in a second reduction.

        Args:
            dropping: nobody wants the result.

        Raises:
            TrainingError: losses have weights on some ranks and none on others, only some ranks
                drop their gradients, or a gradient was deferred and not reported.
        """
        for slot in self.slots.values():
            if slot.deferred and slot.parameter.grad is not None:
                raise TrainingError(
                    f"the gradient of parameter {slot.name} was deferred and never reported ready: "
                    "call engine.gradients_ready() before engine.step()"
                )
        if not self._between_rounds:
            for bucket in self.buckets[self._next :]:
                self._send(bucket)
        late = self._agree_on_late(dropping)
        for bucket in self.buckets:
            bucket.collect()
        for bucket in late:
            self._show(bucket)
            bucket.add_late()
            bucket.wait_for_end = bucket.sent = True
            for slot in bucket.slots:
                slot.late = None

    def complete(self) -> bool:
        """:meth:`finish`, if any rank has a gradient in this window; whether one has."""
        used = torch.tensor([any(slot.used for slot in self.slots.values())], dtype=torch.int32)
        self._communicator.all_reduce(used, "data", Tag(Purpose.CONTROL, site="gradients"))
        if used:
            self.finish()
        return bool(used)

    def _agree_on_late(self, dropping: bool) -> list[GradientBucket]:
        """Buckets in which any rank has late accumulations; one small host collective per axis.

        Hooks run on the host, so the flags are known there and no device has to be waited for.
        It also tells in which buckets any rank has changed parameters, if losses have weights, and
        if ranks have come to different ends of a window.
        """
        flags = {bucket.key: bucket.has_late for bucket in self.buckets}
        for bucket in self.buckets:
            bucket.changed = any(slot.is_changed for slot in bucket.slots)
        by_axis: dict[Axis, list[GradientBucket]] = {}
        for axis, bucket in [
            *((bucket.reduction, bucket) for bucket in self.buckets),
            *((bucket.replicated, bucket) for bucket in self.buckets),  # of what the former found
        ]:
            if bucket.reduced and self._communicator.size(axis) > 1:
                by_axis.setdefault(axis, []).append(bucket)
        if self._communicator.size("data") > 1:
            by_axis.setdefault("data", [])  # rules that communicate by themselves ask nothing else
        ends = [dropping, not dropping]
        weights = [self.weighted is True, self.weighted is False]
        for axis, members in by_axis.items():
            own = [*(flags[b.key] for b in members), *(b.changed for b in members), *weights, *ends]
            told = torch.tensor(own, dtype=torch.int8)
            tag = Tag(Purpose.CONTROL, site="late gradients")
            self._communicator.all_reduce(told, axis, tag, op=Op.MAX)
            *both, with_weight, without, drops, keeps = told.bool().tolist()
            weights, ends = [with_weight, without], [drops, keeps]
            pairs = zip(both[: len(members)], both[len(members) :], strict=True)
            for bucket, (is_late, is_changed) in zip(members, pairs, strict=True):
                flags[bucket.key], bucket.changed = is_late, is_changed
        if all(ends):
            raise TrainingError(
                "some ranks drop a backward (zero_grad(), rebuild()) that others did not run: "
                "where ranks differ, call engine.skip_step() on all"
            )
        if all(weights):
            raise TrainingError(
                "in this window losses have weights on some ranks and none on others: call "
                "engine.backward(loss, weight=...) on all ranks, with 0 where a rank has nothing"
            )
        self.weighted = weights[0] if any(weights) else None
        return [bucket for bucket in self.buckets if flags[bucket.key]]

    def drop(self) -> None:
        """Wait until nothing writes into the buckets any more.

        What one rank has sent, all ranks must send; a window without any backward sends nothing.
        """
        for slot in self.slots.values():
            slot.parameter.grad, slot.arrived = None, False
        if self._between_rounds or any(bucket.sent for bucket in self.buckets):
            self.finish(dropping=True)

    def restart(self) -> None:
        """Begin a new window."""
        self.reduce_now = self.last = False
        self._next, self._between_rounds, self.weighted = 0, False, None
        for bucket in self.buckets:
            bucket.restart()

    def late_buckets(self) -> list[str]:
        """Keys of buckets that were late once, so that their gradients are added up otherwise."""
        waiting = {bucket.key for bucket in self.buckets if bucket.wait_for_end}
        return sorted(waiting - self._always_wait)

    def learn_late(self, keys: Collection[str]) -> None:
        """Have exactly these buckets, of those that need not, wait for the end of the window."""
        for bucket in self.buckets:
            bucket.wait_for_end = bucket.key in self._always_wait or bucket.key in keys

    def note_parameters(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """States have taken over the parameters, all of their own or these, as they are now."""
        for parameter in self.slots if parameters is None else parameters:
            if parameter in self.slots:
                self.slots[parameter].note()

    def close(self) -> None:
        """Remove the hooks, so that another engine may train the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def of_reducer(name: str) -> Any:
    """A property of model states that is an attribute of their ``_reducer``."""
    return property(
        lambda states: getattr(states._reducer, name),
        lambda states, value: setattr(states._reducer, name, value),
        doc="See :class:`~drivetrain.contracts.state.model_states.ModelStates`.",
    )


def _why_not_set(slot: Slot) -> str:
    if slot.arrived:
        return (
            f"parameter {slot.name} was given a .grad after backward, whose gradient the engine "
            "has taken already: change gradients with drivetrain_zero.safe_set_full_grad(), or "
            "write to their fragments, or assign .grad without a backward"
        )
    return (
        f"parameter {slot.name} was given a .grad while losses are scaled (fp16), and nothing "
        "tells whether it is: make it from engine.scale(loss)"
    )
