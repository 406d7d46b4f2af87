"""The layer of a job's attention chain that computes listed blocks only."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.contracts import Attention, AttentionFacts
from drivetrain.errors import TrainingError
from drivetrain_sparse_attention.flex import attend_by_flex, capability_of, serves
from drivetrain_sparse_attention.function import attend_to_blocks
from drivetrain_sparse_attention.layouts import sparsity_of
from drivetrain_sparse_attention.topk import choose_blocks
from drivetrain_sparse_attention.visibility import Blocks, visible_blocks

if TYPE_CHECKING:
    from drivetrain_kernels import Visibility

    from drivetrain_sparse_attention.section import SparseAttentionSection

LAYOUTS_KEPT = 8
"""Layouts of different lengths that are kept at a time."""


class SparseLayer:
    """Attention to the blocks that a config's section says.

    Args:
        section: the section; its mode is not dense.
    """

    def __init__(self, section: SparseAttentionSection) -> None:
        self._section = section
        self._made: dict[tuple[int, int, bool, torch.device], Blocks] = {}

    def around(self, inner: Attention) -> Attention:
        """Take the place of ``inner``."""
        del inner

        def attend(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            facts: AttentionFacts,
        ) -> torch.Tensor:
            _check(module, query, key, facts)
            plain = replace(facts, sinks=None)
            blocks, visible = self._blocks(plain, query, key)
            if serves(query, value, visible, capability_of(query.device)):
                out, lse = attend_by_flex(query, key, value, blocks, visible)
            else:
                out, lse = attend_to_blocks(query, key, value, blocks.lists, visible)
            if facts.sinks is not None:
                sinks = facts.sinks.to(lse.dtype)[None, :, None]
                out = out * torch.sigmoid(lse - sinks)[..., None].to(out.dtype)
            return out.transpose(1, 2).contiguous()

        return attend

    def _blocks(
        self, facts: AttentionFacts, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[Blocks, Visibility]:
        if self._section.mode == "topk":
            return self._chosen(facts, query, key)
        causal = facts.causal and facts.mask is None
        blocks = self._layout(query, causal)
        found = visible_blocks(blocks, facts, query, key)
        if found[1].causal and not causal:  # the mask said so
            blocks = self._layout(query, True)
            found = visible_blocks(blocks, facts, query, key)
        if found[1].query_segments is not None and not blocks.has_diagonal:
            raise TrainingError(
                "sparse_attention: documents and padding need a layout in which tokens see their "
                "own block; this one leaves queries with nothing to attend to"
            )
        return found

    def _chosen(
        self, facts: AttentionFacts, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[Blocks, Visibility]:
        size = self._section.block
        own = _everything(query, size)
        _, flags = visible_blocks(own, replace(facts, bias=None), query, key)
        chosen = choose_blocks(
            query, key, block=size, count=self._section.top_k, causal=flags.causal,
            of_queries=flags.query_segments, of_keys=flags.key_segments,
        )  # fmt: skip
        return visible_blocks(Blocks.of(chosen, size), facts, query, key)

    def _layout(self, query: torch.Tensor, causal: bool) -> Blocks:
        """The layout for sequences as long as ``query``'s, made once for each length."""
        heads, length = query.shape[1:3]
        found = (heads, length, causal, query.device)
        if found not in self._made:
            seen = self._seen(heads, -(-length // self._section.block))
            if causal:
                seen = seen.tril()
            if len(self._made) >= LAYOUTS_KEPT:
                del self._made[next(iter(self._made))]
            self._made[found] = Blocks.of(seen.to(query.device), self._section.block)
        return self._made[found]

    def _seen(self, heads: int, blocks: int) -> torch.Tensor:
        """[1, heads or 1, blocks, blocks]; all, if there are too few for the layout."""
        config = sparsity_of(self._section, heads)
        if blocks < config.fewest_blocks:
            return torch.ones(1, 1, blocks, blocks, dtype=torch.bool)
        layout = config.make_layout(blocks * config.block).bool()
        return layout[None] if config.different_layout_per_head else layout[None, :1]


def _everything(query: torch.Tensor, size: int) -> Blocks:
    """The diagonal: enough to find out what the flags of a call are."""
    blocks = -(-query.shape[2] // size)
    return Blocks.of(torch.eye(blocks, dtype=torch.bool, device=query.device)[None, None], size)


def _check(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, facts: AttentionFacts
) -> None:
    """Refuse what listed blocks say nothing about.

    Raises:
        TrainingError: says what, and what to do.
    """
    name = type(module).__name__
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise TrainingError(
            f"sparse_attention: {name} is of a model with encoder and decoder, whose attention to "
            "each other has no layout: leave out the section"
        )
    if query.shape[2] != key.shape[2]:
        raise TrainingError(
            f"sparse_attention: {query.shape[2]} queries and {key.shape[2]} keys in {name}: "
            "layouts are for whole sequences that attend to themselves, without a cache "
            "(use_cache=False)"
        )
    if facts.dropout > 0:
        raise TrainingError(
            f"sparse_attention: {name} drops {facts.dropout:g} of its attention weights, which is "
            "not done by blocks: set the model's dropout of attention to 0 (attention_dropout, "
            "attn_pdrop, attention_probs_dropout_prob)"
        )
    if facts.softcap is not None:
        raise TrainingError(
            f"sparse_attention: {name} caps its scores (softcap), which is not done by blocks: "
            "leave out the section"
        )
