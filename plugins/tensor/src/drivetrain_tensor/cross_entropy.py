"""Cross-entropy of logits of which each rank has some of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch

from drivetrain.communication.functional import Functional
from drivetrain.contracts import Op, Purpose, Tag
from drivetrain_tensor.lazy_tensor import LazyTensor, part_of

_TAG = Tag(Purpose.ACTIVATION, site="tensor parallel cross-entropy")


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    start: int,
    tp: Functional,
    ignore_index: int = -100,
    vocabulary: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of each target, the same on all ranks. Collective.

    All-reduces of three numbers for each target take the place of a gather of all logits
    (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3).

    Args:
        logits: [..., v] of tokens ``start`` to ``start + v``, computed in any dtype.
        target: [...] tokens of the whole vocabulary.
        start: this rank's first token.
        tp: the ranks.
        ignore_index: targets without a loss, nor a gradient.
        vocabulary: tokens of all ranks; ``None`` leaves it unchecked that targets are among them.

    Returns:
        [...] in float32, or float64 where logits are.

    Raises:
        IndexError: a target is no token, on every rank. On other devices than the host torch stops
            the program later.
    """
    if vocabulary is not None:
        _check(target, vocabulary, ignore_index)
    loss: torch.Tensor = _CrossEntropy.apply(logits, target, start, tp, ignore_index)  # type: ignore[no-untyped-call]
    return loss


def of_lazy_logits(
    x: Any,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor | None:
    """``torch.nn.functional.cross_entropy``, or ``None`` where that has to read all logits."""
    classes = 1 if isinstance(x, LazyTensor) and x.dim() > 1 else 0
    indices = not target.is_floating_point()  # else they are probabilities
    simple = weight is None and size_average is None and reduce is None and not label_smoothing
    if not isinstance(x, LazyTensor) or x.cut != classes or not (simple and indices):
        return None
    known = reduction in ("none", "mean", "sum") and not isinstance(target, LazyTensor)
    if not known or target.shape != x.shape[:classes] + x.shape[classes + 1 :]:
        return None  # torch says what is wrong
    parts, logits = x.parts, part_of(x).movedim(classes, -1)
    losses = vocab_parallel_cross_entropy(
        logits, target, parts.start, parts.tp, ignore_index, vocabulary=parts.extent
    )
    if reduction != "none":
        losses = losses.sum()
    if reduction == "mean":
        losses = losses / (target != ignore_index).sum()
    return losses.to(x.dtype)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        start: int,
        tp: Functional,
        ignore_index: int,
    ) -> torch.Tensor:
        x = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest = x.amax(-1) if x.shape[-1] else x.new_full(x.shape[:-1], float("-inf"))
        tp.communicator.all_reduce(largest, tp.axis, _TAG, op=Op.MAX)
        x = x - largest.unsqueeze(-1)
        index, elsewhere = _own(target, start, x.shape[-1])
        found = x.gather(-1, index.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0)
        sums = torch.stack([x.exp().sum(-1), found])
        tp.communicator.all_reduce(sums, tp.axis, _TAG)
        total, of_target = sums.unbind()
        ignored = target == ignore_index
        ctx.save_for_backward(x, total, target)
        ctx.start, ctx.dtype, ctx.ignore_index = start, logits.dtype, ignore_index
        return (total.log() - of_target).masked_fill(ignored, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, total, target = ctx.saved_tensors
        index, elsewhere = _own(target, ctx.start, x.shape[-1])
        result = x.exp() / total.unsqueeze(-1)
        own = (~elsewhere).to(result.dtype).unsqueeze(-1)
        result.scatter_add_(-1, index.unsqueeze(-1), -own)
        gradient = gradient.masked_fill(target == ctx.ignore_index, 0)
        return (result * gradient.unsqueeze(-1)).to(ctx.dtype), None, None, None, None


def _check(target: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if target.device.type != "cpu":
        torch._assert_async(~wrong.any())
    elif bool(wrong.any()):
        raise IndexError(
            f"target {int(target[wrong][0])} is out of bounds: there are {vocabulary} tokens, and "
            f"ignore_index is {ignore_index}"
        )


def _own(target: torch.Tensor, start: int, extent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of targets among this rank's tokens, and which are not among them."""
    elsewhere = (target < start) | (target >= start + extent)
    return (target - start).masked_fill(elsewhere, 0), elsewhere
