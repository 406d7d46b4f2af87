"""Counts operations where they happen: in which module, in forward, backward or recomputation.

An operator is seen below autograd and below all Python, so that overloaded operators, functions of
other libraries, compositions and the whole of backward count. Which module a node of backward
belongs to is told by its sequence number: autograd numbers nodes as forward makes them, so the
numbers at which modules begin and end are a map from nodes to modules. No graph is changed by it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from drivetrain_profiler.formulas import NOTHING, Cost, cost_of, is_unknown, product_of

Pass = Literal["forward", "backward", "recompute"]


def in_backward() -> bool:
    """Whether autograd runs a graph on this thread."""
    return torch._C._current_graph_task_id() != -1


class ModuleHooks:
    """Hooks around every module's forward, which are removed together.

    Args:
        modules: name -> module.
        enter: called with a name before that module's forward, first of all hooks.
        leave: called after it, also when it has raised, last of all hooks.
    """

    def __init__(
        self,
        modules: Iterable[tuple[str, nn.Module]],
        enter: Callable[[str], None],
        leave: Callable[[str], None],
    ) -> None:
        self._handles = []
        for name, module in modules:
            before = _Call(enter, name)
            self._handles.append(module.register_forward_pre_hook(before, prepend=True))
            after = _Call(leave, name)
            self._handles.append(module.register_forward_hook(after, always_call=True))

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Call:
    """A hook that looks at neither arguments nor results."""

    def __init__(self, function: Callable[[str], None], name: str) -> None:
        self._function, self._name = function, name

    def __call__(self, *_: Any) -> None:
        self._function(self._name)


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs while it is entered; hooks of its modules must be in place meanwhile.

    Attributes:
        costs: (name of a module, pass) -> cost of what runs in it and in no module inside of it.
        unknown: calls of operators without a formula, by qualified name.
        calls: forwards of each module.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.costs: dict[tuple[str, Pass], Cost] = {}
        self.unknown: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inside: list[tuple[str, bool]] = []
        self._numbers: list[int] = []
        self._names: list[str] = []

    def enter_module(self, name: str) -> None:
        """A module's forward begins."""
        self._inside.append((name, in_backward()))
        self.calls[name] += not in_backward()
        self._mark()

    def leave_module(self, name: str) -> None:
        """A module's forward ends."""
        while self._inside:
            if self._inside.pop()[0] == name:  # else one inside, which an exception has left
                break
        self._mark()

    def total(self, names: Iterable[str], which: Pass) -> Cost:
        """The cost of these modules in one pass."""
        total = NOTHING
        for name in names:
            total = total.plus(self.costs.get((name, which), NOTHING))
        return total

    def _mark(self) -> None:
        """Nodes that are made from here on belong to the innermost module."""
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._names.append(self._inside[-1][0] if self._inside else "")

    def _place(self) -> tuple[str, Pass]:
        if self._inside:
            name, again = self._inside[-1]
            if again or not in_backward():
                return name, "recompute" if again else "forward"
        if not in_backward():
            return "", "forward"
        node: Any = torch._C._current_autograd_node()
        number = node._sequence_nr() if hasattr(node, "_sequence_nr") else -1
        found = bisect_right(self._numbers, number) - 1
        return (self._names[found] if found >= 0 else ""), "backward"

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Without autograd, compositions arrive as one operator; their parts are what is counted.
        if product_of(func) is None and func._can_decompose():
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if is_unknown(func):
            self.unknown[func.name()] += 1
        cost = cost_of(func, args, kwargs, result)
        if cost.flops:
            place = self._place()
            self.costs[place] = self.costs.get(place, NOTHING).plus(cost)
        return result
