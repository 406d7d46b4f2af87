"""Counts operations where they happen: in which module, in forward, backward or recomputation.

An operator is seen below autograd and below all Python, so that overloaded operators, functions of
other libraries, compositions and the whole of backward count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from drivetrain_profiler.formulas import NOTHING, Cost, cost_of, is_unknown, product_of
from drivetrain_profiler.places import ModulePlaces, Pass, in_backward


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
        self._places = ModulePlaces()

    def enter_module(self, name: str) -> None:
        """A module's forward begins."""
        self.calls[name] += not in_backward()
        self._places.enter(name)

    def leave_module(self, name: str) -> None:
        """A module's forward ends."""
        self._places.leave(name)

    def total(self, names: Iterable[str], which: Pass) -> Cost:
        """The cost of these modules in one pass."""
        total = NOTHING
        for name in names:
            total = total.plus(self.costs.get((name, which), NOTHING))
        return total

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
            place = self._places.here()
            self.costs[place] = self.costs.get(place, NOTHING).plus(cost)
        return result
