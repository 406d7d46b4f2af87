"""Units of the model are whole while they compute, and only then: stage 3.

[Note: one unit's way] Before a unit's forward its parameters are gathered, after it they are
released. A hook on its outputs gathers them again when backward arrives there; when the gradients
of all its inputs are known, its backward is over and they are released. What is left (inputs
that are leaves or have no gradients, recomputed forwards) is released when the pass ends.

A pass that records a graph of its own (``create_graph=True``, and all of ``torch.func``) uses units
that a backward through that graph needs again, and nothing tells when it comes to which of them.
So these are held until that graph is gone, or until the next update, after which it is void.

At stages 1 and 2 with ``overlap_param_gather`` a unit that is gathered stays so until the next
update, after which there are new values to gather.

Parameters outside all units belong to the *root*, which stays gathered from the beginning of the
model's forward to the end of its backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import nn

from drivetrain.engine.backward_window import accumulates
from drivetrain_zero.gathering import outside_use
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
from drivetrain_zero.gathering.unit import Reason, UnitState
from drivetrain_zero.scripts.copies import Hook

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from drivetrain_zero.gathering.gatherer import Gatherer
    from drivetrain_zero.gathering.order import Walk
    from drivetrain_zero.gathering.unit import GatheredUnit


class UnitHooks:
    """Notices in module and autograd hooks when a unit is used, and when no longer.

    Args:
        gatherer: makes units whole, in the common order.
    """

    def __init__(self, gatherer: Gatherer) -> None:
        self.gatherer = gatherer
        self.units = gatherer.units
        self.taken: nn.Parameter | None = None  # out of its module, while it was released
        self._forward: Walk | None = None
        self._backward: Walk | None = None
        self._number = -1  # of the pass in which backward walks
        self._began = 0  # autograd's number of operations at the beginning of the forward
        self._recorded: Graph | None = None
        self._graphs: WeakSet[Graph] = WeakSet()
        self._unseen_graphs: list[Graph] = []
        self._held_without_graph: list[GatheredUnit] = []
        self._hooks: list[RemovableHandle] = []
        for unit in self.units:
            self._install(unit)

    @property
    def forwards(self) -> Sequence[tuple[int, int]]:
        """Autograd's numbers of operations in each forward whose graph lives."""
        return [graph.operations for graph in self._graphs]

    def begin(self) -> None:
        """Gather what stays whole, and watch what does not. Collective."""
        self.gatherer.gather_persistent()
        outside_use.install(self.units, self.use_outside)

    def release_all(self) -> None:
        """Keep only shards; the graphs of all passes are void."""
        self._backward = None  # an error may have ended it
        self.taken = None
        self._unseen_graphs.clear()
        self._graphs.clear()
        self.gatherer.release_all()

    def close(self) -> None:
        """Remove the hooks."""
        self.release_all()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        outside_use.remove(self.units)
        self.gatherer.order.close()

    def _install(self, unit: GatheredUnit) -> None:
        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._before_forward(unit, (args, kwargs))

        def after(_module: nn.Module, _args: Any, outputs: Any) -> None:
            self._after_forward(unit, outputs)

        def need_root(_module: nn.Module, _args: Any) -> None:
            if not unit.is_whole:  # a part of the root is used outside of the model's forward
                self._visit(unit)

        def used_root(_module: nn.Module, _args: Any, outputs: Any) -> None:
            alone = self._forward is None and not in_backward()
            if alone and torch.is_grad_enabled():  # another backward may end before that of this
                call_before_backward(outputs, partial(self._begin_backward, unit, None, None))

        keep, module = self._hooks.append, unit.module
        keep(module.register_forward_pre_hook(Hook(before), prepend=True, with_kwargs=True))
        keep(module.register_forward_hook(Hook(after), always_call=True))
        if unit.number == 0:
            for part, _ in outside_use.owners(unit):
                if part is not module:
                    keep(part.register_forward_pre_hook(Hook(need_root)))
                    keep(part.register_forward_hook(Hook(used_root)))

    def _walk(self) -> Walk | None:
        """Return the walk under way, if the model computes."""
        if not in_backward():
            return self._forward
        if self._backward is None:
            self._backward = self.gatherer.order.walk("backward", reduces=accumulates())
            self._number = current_pass()
            when_pass_ends(self._end_pass)
        return self._backward

    def _visit(self, unit: GatheredUnit) -> None:
        walk = self._walk()
        # Backward begins at the root, if a forward in between has released it.
        at_once = unit.number == 0 and walk is self._backward
        self.gatherer.visit(unit, None if at_once else walk)

    # -- forward ------------------------------------------------------------------------------

    def _before_forward(self, unit: GatheredUnit, inputs: object) -> None:
        if in_backward():
            self._before_backward(unit)
        else:
            if unit.number == 0 and self._forward is None:
                self._begin_forward()
            self._visit(unit)
        unit.watch(False)
        if torch.is_grad_enabled():
            last = partial(_release, unit) if unit.number else lambda: None
            unit.inputs = InputsKnown(inputs, self._keep_recorded, last)

    def _begin_forward(self) -> None:
        self._forward, self._backward = self.gatherer.order.walk("forward"), None
        self._began = operations_so_far()
        if all(graph.is_over for graph in self._graphs):
            _let_go(self.units)

    def use_outside(self, unit: GatheredUnit, parameter: nn.Parameter | None = None) -> None:
        """Hold ``unit``, whose parameters are used outside of its module, while the model computes.

        Args:
            unit: any.
            parameter: that is used, if it is known.
        """
        if self._forward is None and not in_backward():
            self.taken = self.taken if unit.is_whole else parameter
            return
        if Reason.HELD in unit.reasons:
            return
        if not unit.is_whole:
            self._visit(unit)
        unit.reasons.add(Reason.HELD)
        if not torch.is_grad_enabled():
            self._held_without_graph.append(unit)
        self.gatherer.rest(unit)

    def _after_forward(self, unit: GatheredUnit, outputs: object) -> None:
        inputs, unit.inputs = unit.inputs, None
        if torch.is_grad_enabled():
            graph = None
            if not (unit.number or in_backward()):
                held = [unit for unit in self.units if Reason.HELD in unit.reasons]
                graph = Graph(held, (self._began, operations_so_far()))
                self._graphs.add(graph)
            call_before_backward(outputs, partial(self._begin_backward, unit, inputs, graph))
        if in_backward():
            return  # recomputed; its backward comes at once
        if unit.number == 0:
            self._end_forward()
            self.gatherer.rest(unit)
        elif outside_use.returns_own(unit, outputs):
            self.use_outside(unit)
        elif Reason.HELD not in unit.reasons:
            self.gatherer.rest(unit)

    def _end_forward(self) -> None:
        if not torch.is_grad_enabled():
            # No backward comes back for these; a forward before may hold others.
            held, self._held_without_graph = self._held_without_graph, []
            _let_go(held)
        walk, self._forward = self._forward, None
        if walk is not None:
            self.gatherer.end(walk)
            if torch.is_grad_enabled():
                self.gatherer.order.note(walk)

    # -- backward -----------------------------------------------------------------------------

    def _before_backward(self, unit: GatheredUnit) -> None:
        walk = self._walk()
        assert walk is not None, "backward makes its own walk"
        # A unit that forward has kept is visited all the same, so that ranks which have skipped
        # it know where it is; but the root, which is kept till the end.
        comes = walk.expects(unit.number) if unit.number else unit.state is UnitState.LEFT
        if comes or not unit.is_whole:
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
                if not held.is_whole:  # another backward has let go of it
                    self.gatherer.gather(held, known=False)
                    held.reasons.add(Reason.HELD)
        if inputs is not None:
            inputs.expect()
        if current_pass() != self._number:  # inside of another; its inputs may all be leaves
            when_pass_ends(partial(_release, unit))
        if torch.is_grad_enabled():
            self._hold_for_recorded(unit)
            self._keep_recorded(gradients)

    def _hold_for_recorded(self, unit: GatheredUnit) -> None:
        """Hold a unit for the backward of the graph that the pass under way records."""
        if self._recorded is None:
            self._recorded = Graph()
            self._graphs.add(self._recorded)
        if Reason.HELD not in unit.reasons:
            unit.reasons.add(Reason.HELD)
            self._recorded.held.append(unit)

    def _keep_recorded(self, gradients: object) -> None:
        """Have the graph behind ``gradients`` keep what the pass under way records."""
        graph = self._recorded
        if graph is not None and torch.is_grad_enabled():
            graph.is_kept = keep_with_graph(graph, gradients) or graph.is_kept

    def _end_pass(self) -> None:
        """End a pass that was none of the engine's backward passes, unless it has ended before."""
        if self._backward is not None:
            self.end_backward()

    def end_backward(self) -> None:
        """End the whole backward."""
        order = self.gatherer.order
        walk = self._backward or order.walk("backward", reduces=True)
        self.gatherer.end(walk)  # also if this rank's backward used no unit at all
        self._backward = None
        recorded, self._recorded = self._recorded, None
        if recorded is not None and not recorded.is_kept:
            self._unseen_graphs.append(recorded)  # nobody can tell when it is gone
        del recorded
        if walk.visited:
            order.note(walk)
        if not all(graph.is_over for graph in self._graphs):
            for unit in self.units:
                unit.release()  # unless held
        elif not self.gatherer.until_update:
            self.release_all()

    def updated(self) -> None:
        """Let the next pass use new values. Collective.

        Raises:
            TrainingError: ranks gathered units in different orders.
        """
        self.gatherer.order.settle()
        self.release_all()
        self.gatherer.begin_anew()


def _release(unit: GatheredUnit) -> None:
    """Release a unit whose backward is over, unless it is held."""
    if Reason.HELD not in unit.reasons:
        unit.release()


def _let_go(units: Iterable[GatheredUnit]) -> None:
    """Hold none of ``units`` any more."""
    for unit in units:
        if Reason.HELD in unit.reasons:
            unit.let_go(Reason.HELD)
