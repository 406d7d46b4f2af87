"""Finds what a chunk's forward hands to somebody beside its results, such as losses of hooks."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from drivetrain.errors import TrainingError

_KEY = "drivetrain.sequence.chunk"

_PAUSES = (0.0, 0.001, 0.01, 0.1, 0.5, 1.0, 3.0)
"""Seconds between looks: threads of communication let go of tensors after a collective is through,
and may not get a processor at once."""


class _Mark:
    """Lives as long as the node of a graph that has it."""


class Escapes(TorchFunctionMode):
    """Watches a forward that is computed with a graph which nobody goes backward through.

    A block in chunks has no graph of its own inside, so what hooks collect there would silently
    have no gradient. Once the results are let go of, nothing of the graph may be left.

    Args:
        name: of the block.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._tensors: list[weakref.ref[torch.Tensor]] = []
        self._marks: list[tuple[weakref.ref[_Mark], str]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Remember results that have a graph."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
                self._tensors.append(weakref.ref(leaf))
        return result

    def mark(self, outputs: Iterable[torch.Tensor], parameters: Sequence[torch.Tensor]) -> None:
        """Mark the graph of results, for functions of autograd that no mode sees.

        Args:
            outputs: of the forward.
            parameters: of the block, which outlive the graph.
        """
        known, seen = {id(x) for x in parameters}, set()
        waiting: list[Any] = [y.grad_fn for y in outputs if y.grad_fn is not None]
        while waiting:
            node = waiting.pop()
            if node in seen or id(getattr(node, "variable", None)) in known:
                continue
            seen.add(node)
            mark = node.metadata[_KEY] = _Mark()
            self._marks.append((weakref.ref(mark), type(node).__name__))
            waiting += [following for following, _ in node.next_functions if following is not None]

    def check(self) -> None:
        """Call when results have been let go of.

        Raises:
            TrainingError: something of the graph is left.
        """
        for pause in _PAUSES:
            if (left := self._left()) is None:
                return
            time.sleep(pause)
            gc.collect()  # an exception that was caught may be a cycle
        if (left := self._left()) is not None:
            raise TrainingError(
                f"something keeps {left} that was computed inside of {self._name}, as hooks do "
                "that collect losses (those of routers, too); it has no gradient where blocks are "
                "computed in chunks (sequence_parallel.chunk): detach it, have the block return "
                "it for each token, or leave out the key"
            )

    def _left(self) -> str | None:
        for tensor in reversed(self._tensors):
            if (found := tensor()) is not None:
                return f"a tensor of shape {tuple(found.shape)}"
        return next(
            (f"a result of {name}" for mark, name in self._marks if mark() is not None), None
        )
