"""One attention function for all models, and the layers that packages put around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

Allowed = Callable[
    ["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor | bool"
]
"""``allowed(sample, head, query, key)``: whether a query may attend to a key, by indices of any
shapes that broadcast against each other."""


@dataclass(frozen=True, eq=False)
class MaskRule:
    """A mask as a function of indices, for layers that must not or cannot have it as one tensor.

    Args:
        allowed: says what may be attended to, but for ``padding``.
        build: makes the whole mask [b, 1, s, keys]; ``None`` where ``causal`` says all of it.
        padding: [b, keys], false for keys that only fill up; ``None`` if there are none.
        broadcasts: whether ``allowed`` takes tensors of indices, or only numbers (under ``vmap``).
    """

    allowed: Allowed
    build: Callable[[], torch.Tensor | None]
    padding: torch.Tensor | None = None
    broadcasts: bool = True

    @cached_property
    def tensor(self) -> torch.Tensor | None:
        """The whole mask, made once for all layers of a model that share it."""
        return self.build()


@dataclass(frozen=True, eq=False)
class AttentionFacts:
    """What decides, beside query, key and value, what attention computes.

    A layer changes what it takes care of (``dataclasses.replace``), passes on the rest, and refuses
    by name what it cannot do right.

    Args:
        mask: boolean (true: may attend) or added to scores, broadcast to [b, h, s, keys], beside
            all that the other facts say; or a rule, which says causality and window itself, so that
            ``causal`` and ``window`` hold only where it makes no tensor.
        scale: of scores; 1 / sqrt(head width) if ``None``.
        causal: query i sees keys up to i, counted from the first of both.
        window: a query sees the last ``window`` positions up to its own, and as many ahead if not
            causal; ``None`` for all.
        dropout: share of attention weights that are dropped.
        positions: [b, s], place of each query's token in its sequence.
        segments: [b, s], which of the sequences that are packed into a row a token belongs to;
            tokens attend within their own.
        bias: added to scores, broadcast to [b, h, s, keys].
        softcap: scores are softcap * tanh(scores / softcap).
        sinks: [h], one more score per head that takes weight and has no value.
        slopes: [h], subtracted from scores times the distance of query and key in places (ALiBi,
            arXiv 2108.12409).
        shared: query, key and value are this rank's part of all tokens, whatever the engine's
            forward has cut: the ranks of ``sp`` have equal parts of them, in order. An engine that
            generates says so of tokens that it has cut itself.
    """

    mask: torch.Tensor | MaskRule | None = None
    scale: float | None = None
    causal: bool = False
    window: int | None = None
    dropout: float = 0.0
    positions: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    shared: bool = False


class Attention(Protocol):
    """The function that computes attention, and every layer around it."""

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        facts: AttentionFacts,
    ) -> torch.Tensor:
        """Attend.

        Args:
            module: who asks; layers may keep what is of one layer of the model under it.
            query: [b, h, s, d].
            key: [b, h_kv, keys, d], h a multiple of h_kv.
            value: [b, h_kv, keys, d_v].
            facts: all else.

        Returns:
            [b, s, h, d_v].
        """


class AttentionPhase(IntEnum):
    """Where a layer sits, from the inside out."""

    KERNEL = 0
    """What computes, in place of torch's function."""

    CACHE = 1
    """Keys and values of earlier tokens."""

    MASK = 2
    """Sparse masks and windows."""

    CHUNK = 3
    """Parts of the sequence in turn, with others in host memory."""

    SEQUENCE = 4
    """Exchange between the ranks of a sequence."""

    HEADS = 5
    """Exchange between the ranks that share out heads."""


@dataclass(frozen=True)
class AttentionLayer:
    """A layer offered by the ``wrap_attention`` hook.

    Args:
        phase: its place in the fold.
        wrap: takes the function so far and returns the one with the layer around it.
    """

    phase: AttentionPhase
    wrap: Callable[[Attention], Attention]
