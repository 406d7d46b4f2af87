"""Losses of parts of sequences, as means over all tokens of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from drivetrain.errors import TrainingError
from drivetrain_sequence.chunks.draws import Casts
from drivetrain_sequence.chunks.sums import stray_leaf
from drivetrain_sequence.in_place_of import InPlaceOf
from drivetrain_sequence.measured import MeasuredTile

IGNORED = -100
"""The label of tokens that no loss counts, as in torch."""


class Sum(Protocol):
    """The ranks that share sequences; core's ``Functional`` is one."""

    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks; gradients are summed over ranks."""


def mean_over_sequence(
    total: torch.Tensor, count: torch.Tensor | float, line: Sum | None
) -> torch.Tensor:
    """The mean over all tokens of all parts, the same on every rank.

    Its gradient is as many times that of this rank's part as there are ranks, since an engine
    averages gradients over all ranks, those of one sequence included.

    Args:
        total: sum of the losses of this rank's tokens, a 0-d tensor.
        count: how many these are; a number if it is that of all ranks together.
        line: the ranks of a sequence; ``None`` for one.
    """
    if line is not None and line.size > 1:
        total = line.all_reduce(total)
        if isinstance(count, torch.Tensor):
            count = line.all_reduce(count.detach().to(total.dtype))
    return total / count


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Have each token's label be the one of the token after it; the last has none.

    Args:
        labels: [b, S], of whole sequences.
    """
    return nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def token_losses(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = IGNORED
) -> torch.Tensor:
    """Cross-entropy of each token, at least in float32, 0 for those that do not count.

    Args:
        logits: [..., vocabulary].
        labels: [...], whole numbers.
        ignore_index: the label of tokens that do not count.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none"
    )
    return losses.view(labels.shape)


class CausalLoss:
    """A model's ``loss_function`` over the ranks of a sequence, for labels that are shifted.

    Args:
        line: the ranks of a sequence; ``None`` for one.
        model: whose function it replaces; that still serves calls outside of the engine.

    Attributes:
        original: the model's own function, of the tokens that it is given.
        made: the loss that it has returned last.
        in_tiles: where a head has computed losses in place of logits.
    """

    def __init__(self, line: Sum | None, model: Any) -> None:
        self._line = line
        self._model = model
        self.original = model.loss_function
        self.made: torch.Tensor | None = None
        self.in_tiles: TiledHead | None = None
        model.loss_function = self

    def undo(self) -> None:
        """Give the model its own function back."""
        self._model.loss_function = self.original

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        ignore_index: int = IGNORED,
        shift_labels: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        if shift_labels is None:
            given = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
            return self.original(logits, labels, vocab_size=vocab_size, **given, **others)
        if self.in_tiles is not None and self.in_tiles.labels is not None:
            losses = self.in_tiles.checked(logits, self._model)
        else:
            losses = token_losses(logits, shift_labels, ignore_index)
        count: torch.Tensor | float = (shift_labels != ignore_index).sum()
        if num_items_in_batch is not None:
            count = float(num_items_in_batch)
        self.made = mean_over_sequence(losses.sum(), count, self._line)
        return self.made


def refuse_shifting(model: Any) -> Callable[[], None]:
    """Refuse the loss of the next token in a decoder whose labels are those of its own tokens.

    Over a part of a sequence that loss would shift labels within it.

    Returns:
        Gives the model its own function back.
    """
    losses: Any = sys.modules["transformers.loss.loss_utils"]
    original = model.loss_function
    if original is not losses.ForCausalLMLoss:
        return lambda: None

    def refuse(*_: Any, **__: Any) -> Any:
        raise TrainingError(
            f"{type(model).__name__} computes its loss of the next token of its decoder, which is "
            "not known of parts of sequences: leave out labels and compute it of outputs"
        )

    def undo() -> None:
        model.loss_function = original

    model.loss_function = refuse
    return undo


class TiledHead:
    """A head that computes the losses of a tile of tokens at a time, instead of all logits.

    All that is made of the losses is their sum, so what a tile's logits give for gradients is known
    but for one factor when they are computed, and they are computed once (as in ALST's fused logits
    and loss). Where something looks at gradients of the head's parameters, or the head trains what
    is none of them, logits are computed again in backward. Both happen inside of the head's forward
    and its one node of the graph, so parameters that are gathered for it are there, and their
    gradients arrive once.

    Args:
        head: the module from hidden states [b, s, width] to logits; its ``forward`` is replaced.
        tile: tokens of all rows together whose logits are in memory at a time, or what finds out
            how many.

    Attributes:
        labels: [b, s], of the forward under way; without them the head computes logits.
        made: the losses that it has computed for them, of which only the sum may be used.
    """

    def __init__(self, head: nn.Module, tile: int | MeasuredTile) -> None:
        self._head: Any = head
        self._forward = head.forward
        self._tile = tile
        self._again = False
        self.made: torch.Tensor | None = None
        self.labels: torch.Tensor | None = None
        self.undo: Callable[[], None] = InPlaceOf(head, "forward", self).undo

    def __call__(self, hidden: torch.Tensor) -> Any:
        labels = self.labels
        if labels is None or hidden.shape[:-1] != labels.shape:
            return self._forward(hidden)
        given = (hidden.flatten(0, 1), labels.flatten())
        size = self._tile
        if not isinstance(size, int):
            size = size.along(self._head, self.losses, given, dim=0)
        parameters = [p for p in self._head.parameters() if p.requires_grad]
        watched = any(p._backward_hooks for p in parameters) or torch.compiler.is_compiling()
        if watched or self._again or not torch.is_grad_enabled():
            losses = self._repeated(size, *given)
        else:
            try:
                losses = _Losses.apply(self, size, *given, *parameters)  # type: ignore[no-untyped-call]
            except _Strays:
                self._again = True
                losses = self._repeated(size, *given)
        self.made = losses.view(labels.shape)
        return self.made

    def with_gradients(
        self, own: torch.Tensor, labels: torch.Tensor, parameters: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Losses of a tile, and gradients of their sum for its tokens ``own`` and parameters."""
        casts = Casts(own.device)
        with torch.enable_grad(), casts.again(), _own_graph():
            losses = self.losses(own, labels)
            total = losses.sum()
        if stray_leaf([losses], [own, *parameters]) is not None:
            raise _Strays
        wanted = [x for x in (own, *parameters) if x.requires_grad]
        if not losses.requires_grad:
            return losses, [None] * (1 + len(parameters))
        with casts.none():
            found = iter(torch.autograd.grad(total, wanted, allow_unused=True))
        each = [next(found) if x.requires_grad else None for x in (own, *parameters)]
        return losses.detach(), each

    def losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of tokens [n, width]: [n]."""
        return token_losses(self._forward(hidden), labels)

    def checked(self, logits: torch.Tensor, model: nn.Module) -> torch.Tensor:
        """The losses that stand for ``logits``.

        Raises:
            TrainingError: the model has made something else of what the head has returned.
        """
        if logits is not self.made:
            raise TrainingError(
                f"{type(model).__name__} changes its logits between head and loss, so these cannot "
                "be computed in tiles: leave out sequence_parallel.loss_tile"
            )
        return logits

    def forget(self) -> None:
        """Let go of the latest forward's labels and losses."""
        self.labels = self.made = None

    def _repeated(self, size: int, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Losses whose logits are computed again in backward."""
        each = [
            checkpoint(self.losses, part, target, use_reentrant=False)
            for part, target in _tiles(size, hidden, labels)
        ]
        return torch.cat(each)


class _Strays(Exception):  # noqa: N818  # no error: the head's logits are computed again instead
    """A head trains something that is none of its parameters."""


class _Losses(torch.autograd.Function):
    """Losses of tokens, and gradients of their sum that wait for its factor."""

    @staticmethod
    def forward(
        ctx: Any,
        head: TiledHead,
        size: int,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        losses, for_hidden = [], torch.empty_like(hidden)
        sums: list[torch.Tensor | None] = [None] * len(parameters)
        start = 0
        for part, target in _tiles(size, hidden, labels):
            leaf = part.detach().requires_grad_(ctx.needs_input_grad[2])
            found, (own, *others) = head.with_gradients(leaf, target, parameters)
            losses.append(found)
            if own is not None:
                for_hidden[start : start + len(part)] = own
            start += len(part)
            for i, gradient in enumerate(others):
                if gradient is not None:
                    sums[i] = _added(sums[i], gradient)
        ctx.save_for_backward(for_hidden, *sums)
        ctx.dtypes = [p.dtype for p in parameters]
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        for_hidden, *sums = ctx.saved_tensors
        factor = gradient[0]  # the same for all of them
        others = [
            None if x is None else (x * factor).to(dtype)
            for x, dtype in zip(sums, ctx.dtypes, strict=True)
        ]
        own = (for_hidden * factor).to(for_hidden.dtype) if ctx.needs_input_grad[2] else None
        return None, None, own, None, *others


def _tiles(
    size: int, hidden: torch.Tensor, labels: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and their labels, ``size`` at a time."""
    yield from zip(torch.split(hidden, size), torch.split(labels, size), strict=True)


def _added(total: torch.Tensor | None, gradient: torch.Tensor) -> torch.Tensor:
    """Sums of tiles, at least in float32."""
    if total is None:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32)).contiguous()
    return total.add_(gradient)


def _own_graph() -> Any:
    """Keeps what a tile saves from hooks outside, which move or count it."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x)
