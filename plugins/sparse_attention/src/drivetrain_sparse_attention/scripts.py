"""Layers of a script's own, under the names that DeepSpeed gives them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from drivetrain.contracts import AttentionFacts
from drivetrain_sparse_attention.function import attend_to_blocks
from drivetrain_sparse_attention.layouts import FixedSparsityConfig, SparsityConfig
from drivetrain_sparse_attention.visibility import Blocks, visible_blocks

MaskMode = Literal["add", "mul"]


class SparseSelfAttention(nn.Module):
    """Self-attention to the blocks of a layout.

    The layout is made once, for ``max_seq_length`` tokens, and cut for shorter sequences. The last
    block of a sequence may be short.

    Args:
        sparsity_config: makes the layout; fixed, of 4 heads, by default.
        key_padding_mask_mode: ``"add"``: key padding masks are added to scores; ``"mul"``: zeros
            hide keys.
        attn_mask_mode: the same for attention masks.
        max_seq_length: tokens of the longest sequence, a multiple of the layout's block.

    Raises:
        ValueError: an unknown mode; a layout that cannot be made for ``max_seq_length``.
    """

    def __init__(
        self,
        sparsity_config: SparsityConfig | None = None,
        key_padding_mask_mode: MaskMode = "add",
        attn_mask_mode: MaskMode = "mul",
        max_seq_length: int = 2048,
    ) -> None:
        super().__init__()
        for name, mode in (
            ("key_padding_mask_mode", key_padding_mask_mode),
            ("attn_mask_mode", attn_mask_mode),
        ):
            if mode not in ("add", "mul"):
                raise ValueError(f"{name} is {mode!r}; expected 'add' or 'mul'")
        self.sparsity_config = sparsity_config or FixedSparsityConfig(num_heads=4)
        self.key_padding_mask_mode = key_padding_mask_mode
        self.attn_mask_mode = attn_mask_mode
        self.master_layout: torch.Tensor
        self.register_buffer("master_layout", self.sparsity_config.make_layout(max_seq_length))
        self._blocks: dict[tuple[int, torch.device], Blocks] = {}

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rpe: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [b, h, s, d].
            key: the same shape.
            value: the same shape.
            rpe: added to scaled scores; broadcasts to [b, h, s, s].
            key_padding_mask: [b, s] or [b, 1, 1, s], by ``key_padding_mask_mode``.
            attn_mask: [s, s], or what broadcasts to [b, h, s, s], by ``attn_mask_mode``.

        Returns:
            [b, h, s, d].

        Raises:
            ValueError: shapes or numbers of heads that differ; a sequence that is too long.
        """
        blocks = self._layout(query, key, value)
        allowed, added = None, rpe
        for mask, mode, alone in (
            (key_padding_mask, self.key_padding_mask_mode, True),
            (attn_mask, self.attn_mask_mode, False),
        ):
            if mask is None:
                continue
            shaped = mask.reshape(query.shape[0], 1, 1, -1) if alone else _four(mask)
            if mode == "mul" or mask.dtype == torch.bool:
                shown = shaped != 0
                allowed = shown if allowed is None else allowed & shown
            else:
                shaped = shaped.to(query.dtype)
                added = shaped if added is None else _four(added) + shaped
        facts = AttentionFacts(mask=allowed, bias=None if added is None else _four(added))
        own, visible = visible_blocks(blocks, facts, query, key)
        return attend_to_blocks(query, key, value, own.lists, visible)[0]

    def _layout(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Blocks:
        heads, length = query.shape[1:3]
        if not query.shape == key.shape == value.shape:
            raise ValueError(
                f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} "
                "differ: only self-attention has a layout"
            )
        config = self.sparsity_config
        if heads != config.num_heads:
            raise ValueError(f"{heads} heads, but the sparsity config is of {config.num_heads}")
        count, most = -(-length // config.block), self.master_layout.shape[1]
        if count > most:
            raise ValueError(
                f"a sequence of {length} tokens is longer than max_seq_length, "
                f"{most * config.block}"
            )
        known = (count, query.device)
        if known not in self._blocks:
            seen = self.master_layout[None, :, :count, :count].to(query.device).bool()
            same = not config.different_layout_per_head
            self._blocks[known] = Blocks.of(seen[:, :1] if same else seen, config.block)
        return self._blocks[known]


def _four(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(*(1,) * (4 - x.dim()), *x.shape)


class BertSparseSelfAttention(nn.Module):
    """Query, key and value of a BERT-like layer, and attention to the blocks of a layout.

    Names of parameters are those of ``BertSelfAttention``, so that its weights load. Weights of
    attention are not dropped.

    Args:
        config: of the model: ``hidden_size``, ``num_attention_heads``.
        sparsity_config: makes the layout; fixed, by default, with the model's heads.
        max_seq_length: tokens of the longest sequence; the model's positions, up to a whole block.

    Raises:
        ValueError: heads that do not divide ``hidden_size``, or are not the layout's.
    """

    def __init__(
        self,
        config: Any,
        sparsity_config: SparsityConfig | None = None,
        max_seq_length: int | None = None,
    ) -> None:
        super().__init__()
        heads, width = config.num_attention_heads, config.hidden_size
        if width % heads:
            raise ValueError(f"{heads} attention heads do not divide hidden_size {width}")
        sparsity_config = sparsity_config or FixedSparsityConfig(num_heads=heads)
        if sparsity_config.num_heads != heads:
            raise ValueError(
                f"the model has {heads} heads, but the sparsity config is of "
                f"{sparsity_config.num_heads}"
            )
        self.num_attention_heads, self.attention_head_size = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        known: int = getattr(config, "max_position_embeddings", 2048)
        longest = known if max_seq_length is None else max_seq_length
        longest += -longest % sparsity_config.block
        self.sparse_self_attention = SparseSelfAttention(sparsity_config, max_seq_length=longest)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> tuple[torch.Tensor, None]:
        """Attend.

        Args:
            hidden_states: [b, s, width].
            attention_mask: added to scores, or boolean (true: may attend): [b, s], or what
                broadcasts to [b, h, s, s].
            others: what layers of Transformers hand on, and this one has no use for.

        Returns:
            [b, s, width], and no attention weights.

        Raises:
            ValueError: attention weights are asked for.
        """
        if others.get("output_attentions"):
            raise ValueError("attention weights are never all in memory: no output_attentions")
        query, key, value = (
            linear(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        masks: dict[str, torch.Tensor | None] = {"key_padding_mask": attention_mask}
        if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.shape[2] > 1:
            name = "attn_mask" if attention_mask.dtype == torch.bool else "rpe"
            masks = {name: attention_mask}
        result = self.sparse_self_attention(query, key, value, **masks)
        return result.transpose(1, 2).flatten(2), None
