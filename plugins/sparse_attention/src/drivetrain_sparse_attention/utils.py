"""Longer sequences for pretrained models: positions, tokenizers, layers, and padding to blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from drivetrain_sparse_attention.layouts import FixedSparsityConfig, SparsityConfig
from drivetrain_sparse_attention.scripts import BertSparseSelfAttention

_RESERVED = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "longformer": 2}
"""First positions of a kind of model that no token has."""


class SparseAttentionUtils:
    """What turns a pretrained BERT-like model of Transformers into one with sparse attention."""

    @staticmethod
    def extend_position_embedding(model: Any, max_position: int) -> Any:
        """Repeat the learned positions until there are ``max_position`` of them.

        Args:
            model: BERT- or RoBERTa-like, with or without a head; changed in place.
            max_position: tokens of the longest sequence.

        Returns:
            ``model``.

        Raises:
            ValueError: no learned absolute positions are found, or there are more already.
        """
        embeddings = _embeddings_of(model)
        reserved = _RESERVED.get(getattr(model.config, "model_type", ""), 0)
        weight = embeddings.position_embeddings.weight
        learned = weight[reserved:]
        if max_position < len(learned):
            raise ValueError(f"the model has {len(learned)} positions, more than {max_position}")
        copies = -(-max_position // len(learned))
        with torch.no_grad():
            repeated = torch.cat([learned] * copies)[:max_position]
            table = torch.cat([weight[:reserved], repeated])
        old = embeddings.position_embeddings
        new = nn.Embedding.from_pretrained(table, padding_idx=old.padding_idx)  # type: ignore[no-untyped-call]
        new.weight.requires_grad_(weight.requires_grad)
        embeddings.position_embeddings = new
        _renew_buffers(embeddings, len(table))
        model.config.max_position_embeddings = len(table)
        return model

    @staticmethod
    def update_tokenizer_model_max_length(tokenizer: Any, max_position: int) -> Any:
        """Let ``tokenizer`` make sequences of ``max_position`` tokens; returns it."""
        tokenizer.model_max_length = max_position
        tokenizer.init_kwargs["model_max_length"] = max_position
        return tokenizer

    @staticmethod
    def replace_model_self_attention_with_sparse_self_attention(
        model: Any, max_position: int, sparsity_config: SparsityConfig | None = None
    ) -> Any:
        """Have all layers of a BERT- or RoBERTa-like model attend to the blocks of a layout.

        Args:
            model: changed in place; weights stay.
            max_position: tokens of the longest sequence.
            sparsity_config: makes the layout; fixed, with the model's heads, by default.

        Returns:
            ``model``.

        Raises:
            ValueError: the model has no such layers.
        """
        encoder = getattr(_base_of(model), "encoder", None)
        layers = getattr(encoder, "layer", None)
        if layers is None:
            raise ValueError(
                f"{type(model).__name__} has no encoder of BERT's kind; the config's section "
                "sparse_attention serves any model whose attention plugins can reach"
            )
        model.config.max_position_embeddings = max(
            max_position, getattr(model.config, "max_position_embeddings", 0)
        )
        replace = SparseAttentionUtils.replace_self_attention_layer_with_sparse_self_attention_layer
        replace(model.config, layers, sparsity_config)
        return model

    @staticmethod
    def replace_self_attention_layer_with_sparse_self_attention_layer(
        config: Any, layers: Iterable[Any], sparsity_config: SparsityConfig | None = None
    ) -> Iterable[Any]:
        """Replace ``attention.self`` of each layer, keeping its weights; returns ``layers``."""
        sparsity_config = sparsity_config or FixedSparsityConfig(config.num_attention_heads)
        for layer in layers:
            before = layer.attention.self
            made = BertSparseSelfAttention(config, sparsity_config)
            for name in ("query", "key", "value"):
                setattr(made, name, getattr(before, name))
            layer.attention.self = made.train(before.training)
        return layers

    @staticmethod
    def pad_to_block_size(
        block_size: int,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pad_token_id: int,
        model_embeddings: Any,
    ) -> tuple[
        int,
        torch.Tensor | None,
        torch.Tensor | None,
        torch.Tensor | None,
        torch.Tensor | None,
        torch.Tensor | None,
    ]:
        """Pad the inputs of a model at the end of rows, to a multiple of ``block_size``.

        Args:
            block_size: tokens of a block.
            input_ids: [b, s], or ``None`` with ``inputs_embeds``.
            attention_mask: [b, s]; padded with 0. One is made if there is none, since nothing else
                would hide the padding.
            token_type_ids: [b, s]; padded with 0.
            position_ids: [b, s]; padded with ``pad_token_id``.
            inputs_embeds: [b, s, width]; padded with embeddings of ``pad_token_id``.
            pad_token_id: of the vocabulary.
            model_embeddings: embeds tokens; needed with ``inputs_embeds`` alone.

        Returns:
            How many tokens were added to each row, and the five inputs in order.

        Raises:
            ValueError: there is neither ``input_ids`` nor ``inputs_embeds``.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("neither input_ids nor inputs_embeds are given")
        rows, length = given.shape[:2]
        added = -length % block_size
        if added == 0:
            return 0, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        if inputs_embeds is not None:
            tokens = torch.full((rows, added), pad_token_id, device=inputs_embeds.device)
            inputs_embeds = torch.cat([inputs_embeds, model_embeddings(tokens)], dim=1)
        if attention_mask is None:
            attention_mask = torch.ones(rows, length, dtype=torch.int64, device=given.device)

        def padded(x: torch.Tensor | None, value: int) -> torch.Tensor | None:
            return None if x is None else nn.functional.pad(x, (0, added), value=value)

        return (
            added,
            padded(input_ids, pad_token_id),
            padded(attention_mask, 0),
            padded(token_type_ids, 0),
            padded(position_ids, pad_token_id),
            inputs_embeds,
        )

    @staticmethod
    def unpad_sequence_output(pad_len: int, sequence_output: torch.Tensor) -> torch.Tensor:
        """Take ``pad_len`` tokens off the end of rows [b, s, ...]."""
        return sequence_output[:, :-pad_len] if pad_len else sequence_output


def _base_of(model: Any) -> Any:
    return getattr(model, getattr(model, "base_model_prefix", ""), model)


def _embeddings_of(model: Any) -> Any:
    embeddings = getattr(_base_of(model), "embeddings", None)
    if not isinstance(getattr(embeddings, "position_embeddings", None), nn.Embedding):
        raise ValueError(
            f"{type(model).__name__} has no table of learned positions (embeddings."
            "position_embeddings) that could be extended"
        )
    return embeddings


def _renew_buffers(embeddings: Any, positions: int) -> None:
    """Positions and token types that models keep ready for their longest sequence."""
    device = embeddings.position_embeddings.weight.device
    for name, made in (
        ("position_ids", torch.arange(positions, device=device)[None]),
        ("token_type_ids", torch.zeros(1, positions, dtype=torch.int64, device=device)),
    ):
        if isinstance(getattr(embeddings, name, None), torch.Tensor):
            setattr(embeddings, name, made)
