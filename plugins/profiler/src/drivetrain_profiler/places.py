"""Where a program is: in which module, in forward, backward or recomputation.

Which module a node of backward belongs to is told by its sequence number: autograd numbers nodes as
forward makes them, so the numbers at which modules begin and end are a map from nodes to modules.
No graph is changed by it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

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


class ModulePlaces:
    """Follows modules as their forwards begin and end, by calls of :class:`ModuleHooks`."""

    def __init__(self) -> None:
        self._inside: list[tuple[str, bool]] = []
        self._numbers: list[int] = []
        self._names: list[str] = []

    def enter(self, name: str) -> None:
        """A module's forward begins."""
        self._inside.append((name, in_backward()))
        self._mark()

    def leave(self, name: str) -> None:
        """A module's forward ends."""
        while self._inside:
            if self._inside.pop()[0] == name:  # else one inside, which an exception has left
                break
        self._mark()

    @property
    def number(self) -> int:
        """Autograd's number from which on nodes are those after the last forward."""
        return self._numbers[-1] if self._numbers else 0

    def here(self) -> tuple[str, Pass]:
        """The innermost module and the pass of what runs now; empty outside of all modules."""
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

    def _mark(self) -> None:
        """Nodes that are made from here on belong to the innermost module."""
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._names.append(self._inside[-1][0] if self._inside else "")
