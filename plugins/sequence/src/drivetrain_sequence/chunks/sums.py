"""Gradients of a block's inputs and parameters, added up over chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from drivetrain.errors import TrainingError


class GradientSums:
    """Sums over the chunks of one backward of a block.

    Args:
        tensors: inputs of the block, wherever they wait; those without gradient are ``None``.
        dims: along which dimension each of them is cut; ``None`` for whole ones.
        parameters: of the block, or what else trains.
        device: where sums are.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor | None],
        dims: Sequence[int | None],
        parameters: Sequence[torch.Tensor],
        device: torch.device,
    ) -> None:
        self._dims = dims
        self._parameters = parameters
        self._inputs = [
            None if x is None else torch.zeros(x.shape, dtype=x.dtype, device=device)
            for x in tensors
        ]
        self._sums: list[torch.Tensor | None] = [None] * len(parameters)

    def add(
        self,
        part: range,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
    ) -> None:
        """Go backward through one chunk.

        Args:
            part: its place among the tokens of inputs.
            inputs: of the chunk.
            outputs: of the chunk, with a graph.
            gradients: of outputs.
        """
        pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
        if not pairs:
            return
        wanted = [x for x in inputs if x.requires_grad]
        found: Sequence[torch.Tensor | None] = torch.autograd.grad(
            [y for y, _ in pairs],
            [*wanted, *self._parameters],
            [g.to(y.dtype) for y, g in pairs],
            allow_unused=True,
        )
        for_inputs = iter(found[: len(wanted)])
        for total, dim, x in zip(self._inputs, self._dims, inputs, strict=True):
            gradient = next(for_inputs) if x.requires_grad else None
            if total is None or gradient is None:
                continue
            own = total if dim is None else total.narrow(dim, part.start, len(part))
            own.add_(gradient)
        for i, gradient in enumerate(found[len(wanted) :]):
            if gradient is None:
                continue
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            before = self._sums[i]
            self._sums[i] = wide if before is None else before.add_(wide)

    def found(self) -> list[torch.Tensor | None]:
        """Gradients of inputs, and then of parameters."""
        pairs = zip(self._sums, self._parameters, strict=True)
        return [*self._inputs, *(None if x is None else x.to(p.dtype) for x, p in pairs)]


class OwnLeaves:
    """Refuses blocks whose gradients would get lost, as only those of their own are looked after.

    Args:
        name: of the block.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._checked = False

    def refuse_hooks(self, parameters: Sequence[nn.Parameter]) -> None:
        """Refuse parameters with hooks on their gradients, which would run for every chunk.

        Raises:
            TrainingError: there is one.
        """
        if any(p._backward_hooks for p in parameters):
            raise TrainingError(
                f"a parameter of {self._name} has a hook on its gradient, which would see that of "
                "every chunk (sequence_parallel.chunk): use register_post_accumulate_grad_hook"
            )

    def check(self, outputs: Sequence[torch.Tensor], known: Sequence[torch.Tensor]) -> None:
        """Look once for tensors that train and are neither inputs nor parameters of the block.

        Args:
            outputs: of a chunk, with a graph.
            known: inputs and parameters.

        Raises:
            TrainingError: there is one.
        """
        if self._checked:
            return
        self._checked = True
        if (leaf := stray_leaf(outputs, known)) is not None:
            raise TrainingError(
                f"{self._name} uses a tensor of shape {tuple(leaf.shape)} that is trained and "
                "is neither given to it nor one of its parameters, so that its gradient would "
                "be lost in chunks (sequence_parallel.chunk): hand it in as an argument"
            )


def stray_leaf(
    outputs: Sequence[torch.Tensor], known: Sequence[torch.Tensor]
) -> torch.Tensor | None:
    """A tensor that trains, on which ``outputs`` depend and which is none of ``known``, if any."""
    names, seen = {id(x) for x in known}, set()
    waiting = [y.grad_fn for y in outputs if y.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf: torch.Tensor | None = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in names:
            return leaf
        waiting += [following for following, _ in node.next_functions if following is not None]
    return None
