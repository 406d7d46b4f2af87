"""Units of the model are whole while they compute, and only then: stage 3.

[Note: one unit's way] Before a unit's forward its parameters are gathered, after it they are
released. A hook on its outputs gathers them again when backward arrives there; when the gradients
of all its inputs are known, its backward is over and they are released. What is left (inputs
that are leaves or have no gradients, recomputed forwards) is released when the pass ends.

A pass that records a graph of its own (``create_graph=True``, and all of ``torch.func``) uses units
that a backward through that graph needs again, and nothing tells when it comes to which of them.
So these stay gathered until that graph is gone, or until the next update, after which it is void.

At stages 1 and 2 with ``overlap_param_gather`` a unit that is gathered stays so until the next
update, after which there are new values to gather.

Parameters outside all units belong to the *root*, which stays gathered from the beginning of the
model's forward to the end of its backward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import nn

from drivetrain.engine.backward_window import accumulates
from drivetrain_zero.gathering.backward_hooks import (
    Graph,
    InputsKnown,
    call_before_backward,
    current_pass,
    in_backward,
    keep_with_graph,
    operations_so_far,
    when_pass_ends,
)
from drivetrain_zero.gathering.order import Pass
from drivetrain_zero.gathering.outside_use import remove, returns_own
from drivetrain_zero.scripts.copies import Hook

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from drivetrain_zero.gathering.agreement import Agreement
    from drivetrain_zero.gathering.unit import GatheredUnit

_DIGEST_PRIME = 16_777_213
"""Below 2^24, so that a digest is a whole number in float32."""

logger = logging.getLogger("drivetrain.zero")


@dataclass(frozen=True)
class GatherPolicy:
    """When parameters are gathered and kept.

    Args:
        ahead: largest number of elements gathered before they are needed; 0 for none.
        live: nothing is gathered ahead beyond this number of gathered elements.
        persistent: units with at most this many elements stay gathered.
        persistent_total: largest number of elements that stay gathered.
        reuse_distance: a unit that backward needs within this many elements stays gathered after
            forward; ``None`` keeps only the last one.
        until_update: whatever is gathered stays so until its shards change.
        log_order: say when units are used in another order than learned.
    """

    ahead: int
    live: int
    persistent: int
    persistent_total: int
    reuse_distance: int | None
    until_update: bool
    log_order: bool


class Gathering:
    """Gathers and releases units from module and autograd hooks.

    Args:
        units: the root first; see :func:`find_units`.
        policy: when to gather and keep.
        asynchronous: gather ahead while the device computes.
        agreement: keeps gathers of different units apart; ``None`` where a rank reads the others'
            shards where they lie, so that none has to take part in the gathers of another.
        passed: told in backward, at the same places on all ranks, which units are behind it.
    """

    def __init__(
        self,
        units: Sequence[GatheredUnit],
        policy: GatherPolicy,
        *,
        asynchronous: bool,
        agreement: Agreement | None,
        passed: Callable[[Sequence[int]], None],
    ) -> None:
        self.units = units
        self.alone = agreement is None
        self._agreement = agreement
        self._passed = passed
        self.forward_order = [unit.number for unit in units]
        self.backward_order = self.forward_order[::-1]
        self.left_order = False
        self.taken: nn.Parameter | None = None  # out of its module, while it was released
        self.gathers = 0
        """Running digest of the gathers of this window; equal on all ranks."""
        self._policy = policy
        self._asynchronous = asynchronous
        self._forward: Pass | None = None
        self._backward: Pass | None = None
        self._number, self._began = -1, 0
        self._accumulates = True
        self._recorded: Graph | None = None
        self.last_forward: Pass | None = None
        self.last_backward: Pass | None = None
        self._held_without_graph: list[GatheredUnit] = []
        self._graphs: WeakSet[Graph] = WeakSet()
        self._unseen_graphs: list[Graph] = []
        self._hooks: list[RemovableHandle] = []
        self._fetches = any(bucket.fetches for unit in units for bucket in unit.buckets)
        self._choose_persistent()
        for unit in units:
            self._install(unit)

    @property
    def forwards(self) -> Sequence[tuple[int, int]]:
        """Autograd's numbers of operations in each forward whose graph lives."""
        return [graph.operations for graph in self._graphs]

    def _choose_persistent(self) -> None:
        total = 0
        for unit in sorted(self.units, key=lambda unit: unit.numel):
            total += unit.numel
            fits = total <= self._policy.persistent_total
            unit.persistent = fits and unit.numel <= self._policy.persistent

    def gather_persistent(self) -> None:
        """Make the units whole that stay so. Collective."""
        for unit in self.units:
            if unit.persistent:
                unit.gather()

    def gather_anew(self) -> None:
        """Give units that stay whole over an update their new values. Collective."""
        for unit in self.units:
            if unit.gathered:
                for bucket in unit.buckets:
                    bucket.release()
                    if unit.pins:
                        bucket.gather_private()
                unit.started = unit.gathered = unit.pins > 0
                unit.gather()

    def gather_next(self) -> None:
        """After an update, begin to gather what the next forward uses first. Collective."""
        if self._policy.until_update and self._asynchronous:
            walk = Pass(self.forward_order)
            first = self.units[self.forward_order[0]]
            walk.step()
            self._start(first, asynchronous=True)
            self._gather_ahead(first, walk)

    def release_all(self) -> None:
        """Keep only shards."""
        self._backward = None  # an error may have ended it
        self.taken = None
        self._unseen_graphs.clear()
        self._graphs.clear()
        for unit in self.units:
            unit.kept = unit.held = unit.rejoins = False
            unit.release()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        remove(self.units)
        if self._agreement is not None:
            self._agreement.close()

    # -- hooks --------------------------------------------------------------------------------

    def _install(self, unit: GatheredUnit) -> None:
        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._before_forward(unit, (args, kwargs))

        def after(_module: nn.Module, _args: Any, outputs: Any) -> None:
            self._after_forward(unit, outputs)

        def need_root(_module: nn.Module, _args: Any) -> None:
            self._need_root()

        keep = self._hooks.append
        keep(unit.module.register_forward_pre_hook(Hook(before), prepend=True, with_kwargs=True))
        keep(unit.module.register_forward_hook(Hook(after), always_call=True))
        if unit.number == 0:
            for module in _owners(unit):
                keep(module.register_forward_pre_hook(Hook(need_root)))

    def _need_root(self) -> None:
        """A part of the root is used outside of the model's forward."""
        root = self.units[0]
        if not root.gathered:
            self._visit(root)

    def _before_forward(self, unit: GatheredUnit, inputs: object) -> None:
        if in_backward():
            self._before_backward(unit)
        else:
            if unit.number == 0 and self._forward is None:
                self._begin_forward()
            self._visit(unit)
        unit.watch(False)
        if torch.is_grad_enabled():
            last = partial(self._release, unit) if unit.number else lambda: None
            unit.inputs = InputsKnown(inputs, self._keep_recorded, last)

    def _begin_forward(self) -> None:
        self._forward, self._backward = Pass(self.forward_order), None
        self._began = operations_so_far()
        if all(graph.is_over for graph in self._graphs):
            self._let_go(self.units)

    def use_outside(self, unit: GatheredUnit, parameter: nn.Parameter | None = None) -> None:
        """Somebody uses parameters of ``unit`` outside of its module, while the model computes."""
        if self._forward is None and not in_backward():
            self.taken = self.taken if unit.gathered else parameter
            return
        if unit.held:
            return
        if not unit.gathered:
            self._visit(unit)
        unit.held = True  # nobody can tell for how long
        if not torch.is_grad_enabled():
            self._held_without_graph.append(unit)
        self._rest(unit)

    def _let_go(self, units: Iterable[GatheredUnit]) -> None:
        """Hold none of ``units`` any more."""
        for unit in units:
            if unit.held:
                unit.held = unit.rejoins = False
                unit.release()

    def _release(self, unit: GatheredUnit) -> None:
        if not unit.held:
            unit.release()

    def _after_forward(self, unit: GatheredUnit, outputs: object) -> None:
        inputs, unit.inputs = unit.inputs, None
        if torch.is_grad_enabled():
            graph = None
            if not (unit.number or in_backward()):
                operations = (self._began, operations_so_far())
                graph = Graph([unit for unit in self.units if unit.held], operations)
                self._graphs.add(graph)
            call_before_backward(outputs, partial(self._begin_backward, unit, inputs, graph))
        if in_backward():
            return  # recomputed; its backward comes at once
        if unit.number:
            if returns_own(unit, outputs):
                self.use_outside(unit)
            elif not unit.held:
                self._rest(unit)
            return
        if not torch.is_grad_enabled():
            # No backward comes back for these; a forward before may hold others.
            held, self._held_without_graph = self._held_without_graph, []
            self._let_go(held)
        current, self._forward = self._forward, None
        if current is not None:
            self._end(current)
            self.last_forward = current if torch.is_grad_enabled() else self.last_forward
        self._rest(unit)

    def _before_backward(self, unit: GatheredUnit) -> None:
        walk = self._walk()
        assert walk is not None, "backward makes its own walk"
        # A unit that forward has kept is visited all the same, so that ranks which have skipped
        # it know where it is; but the root, which is kept till the end.
        comes = unit.number and not self.alone and unit.number not in walk.reached
        if comes or not unit.gathered or (unit.rejoins and not unit.number):
            self._visit(unit)

    def _begin_backward(
        self,
        unit: GatheredUnit,
        inputs: InputsKnown | None,
        graph: Graph | None,
        gradients: Sequence[Any],
    ) -> None:
        """Backward comes to what a forward of ``unit`` has made; with ``graph``, of the model."""
        self._before_backward(unit)
        if graph is not None:
            graph.is_over = not torch.is_grad_enabled()
            for held in graph.held:
                if not held.gathered:  # another backward has let go of it
                    self._start(held, asynchronous=False, known=False)
                    self._finish(held)
                    held.held = True
        if inputs is not None:
            inputs.expect()
        if current_pass() != self._number:  # inside of another; its inputs may all be leaves
            when_pass_ends(partial(self._release, unit))
        if torch.is_grad_enabled():
            self._hold_for_recorded(unit)
            self._keep_recorded(gradients)

    def _hold_for_recorded(self, unit: GatheredUnit) -> None:
        """Hold a unit for the backward of the graph that the pass under way records."""
        if self._recorded is None:
            self._recorded = Graph()
            self._graphs.add(self._recorded)
        if not unit.held:
            unit.held = True
            self._recorded.held.append(unit)

    def _keep_recorded(self, gradients: object) -> None:
        """Have the graph behind ``gradients`` keep what the pass under way records."""
        graph = self._recorded
        if graph is not None and torch.is_grad_enabled():
            graph.is_kept = keep_with_graph(graph, gradients) or graph.is_kept

    def _end_pass(self) -> None:
        """A pass is over that was none of the engine's backward passes, unless it ended before."""
        if self._backward is not None:
            self.end_backward()

    def end_backward(self) -> None:
        """The whole backward is over."""
        current = self._backward or Pass(self.backward_order)
        self._end(current)  # also if this rank's backward used no unit at all
        self._backward, self._accumulates = None, True
        recorded, self._recorded = self._recorded, None
        if recorded is not None and not recorded.is_kept:
            self._unseen_graphs.append(recorded)  # nobody can tell when it is gone
        del recorded
        if current.visited:
            self.last_backward = current
        if not all(graph.is_over for graph in self._graphs):
            for unit in self.units:
                unit.release()  # unless held
        elif not self._policy.until_update:
            self.release_all()

    # -- one pass -----------------------------------------------------------------------------

    def _visit(self, unit: GatheredUnit) -> None:
        """Gather a unit that is about to be used, after those that come before it."""
        walk = self._walk()
        # Backward begins at the root, if a forward in between has released it.
        if walk is None or (unit.number == 0 and in_backward()):
            self._start(unit, asynchronous=False)
            self._finish(unit)
            return
        if unit.held:
            walk.visited.append(unit.number)  # it is whole, and joined when its turn comes
            return
        for number in walk.visit(unit.number):
            if self.alone:
                walk.step()
            else:
                self._join(self.units[number], walk)
        if walk.is_lost:
            self._note_other_order(unit)
            self._start(unit, asynchronous=False, known=False)
        else:
            self._reach(unit, walk)
        self._finish(unit)

    def _reach(self, unit: GatheredUnit, walk: Pass) -> None:
        """The walk has come to ``unit``: what all ranks do at this place, whoever uses it."""
        walk.step()
        if not self.alone:
            if unit.number in walk.reached:
                unit.release()  # as it is on ranks that have only joined it
            if in_backward() and self._accumulates:
                self._passed(walk.reached[-1:])
        walk.reached.append(unit.number)
        self._start(unit, asynchronous=self._asynchronous)
        if self._fetches:
            self._fetch_ahead(unit, walk)
        if self._asynchronous:
            self._gather_ahead(unit, walk)

    def _walk(self) -> Pass | None:
        if not in_backward():
            return self._forward
        if self._backward is None:
            self._backward = Pass(self.backward_order)
            self._number, self._accumulates = current_pass(), accumulates()
            when_pass_ends(self._end_pass)
        return self._backward

    def _start(self, unit: GatheredUnit, *, asynchronous: bool, known: bool = True) -> None:
        if unit.started and not unit.rejoins:
            return
        unit.kept = self._policy.until_update
        self.gathers = (self.gathers * 31 + unit.number + 1) % _DIGEST_PRIME
        if self._agreement is None:
            unit.start(asynchronous=asynchronous)
            return
        unit.turn = self._agreement.begin(unit.name, known=known)
        with self._agreement.waits(unit.turn, unit.name):
            unit.start(asynchronous=asynchronous)

    def _finish(self, unit: GatheredUnit) -> None:
        if self._agreement is None or unit.gathered:
            unit.gather()
            return
        with self._agreement.waits(unit.turn, unit.name):
            unit.gather()

    def _gather_ahead(self, unit: GatheredUnit, walk: Pass) -> None:
        """Start the next units. Which ones depends on the order alone, not on what is gathered.

        So one that comes again has to wait for its turn: ranks release it at different times.
        """
        room = min(self._policy.ahead, self._policy.live - unit.numel)
        for number in walk.ahead():
            following = self.units[number]
            room -= following.numel
            if room < 0:
                return
            if self.alone or number not in walk.reached:
                self._start(following, asynchronous=True)

    def _fetch_ahead(self, unit: GatheredUnit, walk: Pass) -> None:
        """Bring near what is gathered after the next units; a matter of this rank alone."""
        room = min(2 * self._policy.ahead, self._policy.live - unit.numel)
        for place, number in enumerate(walk.ahead() if self._policy.ahead else ()):
            following = self.units[number]
            room -= following.numel
            if room < 0 and place:  # the very next one is as good as in use
                return
            following.fetch_ahead()

    def _join(self, unit: GatheredUnit, walk: Pass) -> None:
        """Take part in the gather of a unit that other ranks may need."""
        self._reach(unit, walk)
        self._finish(unit)
        if in_backward():
            unit.release()
        else:
            self._rest(unit)

    def _end(self, walk: Pass) -> None:
        for number in () if self.alone else walk.end():
            self._join(self.units[number], walk)

    def _rest(self, unit: GatheredUnit) -> None:
        """A unit's forward is over: keep what backward needs soon, else release it."""
        # What a forward with a graph has kept, none without takes away before backward comes.
        unit.awaited = unit.awaited or (torch.is_grad_enabled() and self._soon_again(unit))
        if unit.awaited:
            unit.watch(True)
        else:
            unit.release()

    def _soon_again(self, unit: GatheredUnit) -> bool:
        if unit.number == 0:
            return True
        place = len(self.forward_order) - 1 - self.forward_order[::-1].index(unit.number)
        between = self.forward_order[place + 1 :]
        if self._policy.reuse_distance is None:
            return not between
        distance = sum(self.units[number].numel for number in between)
        return 2 * distance + unit.numel <= self._policy.reuse_distance

    def _note_other_order(self, unit: GatheredUnit) -> None:
        first, self.left_order = not self.left_order, True
        if first and self._policy.log_order:
            logger.warning("unit %r is used in another order than before", unit.name or "root")


def _owners(unit: GatheredUnit) -> Iterator[nn.Module]:
    """Modules that directly own parameters of the root, but the root module itself."""
    own = set(unit.parameters)
    for module in unit.module.modules():
        if module is not unit.module and _owns_any(module, own):
            yield module


def _owns_any(module: nn.Module, parameters: Iterable[nn.Parameter]) -> bool:
    return any(p in parameters for p in module.parameters(recurse=False))
