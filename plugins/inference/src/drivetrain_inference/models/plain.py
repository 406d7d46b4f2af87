"""Any decoder of Transformers over a paged cache: its own modules, its own forward."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain_inference.adapters.adapter import Adapter, Group, adapted
from drivetrain_inference.cache.paged import LayerSpec, PagedCache, RaggedBatch
from drivetrain_inference.models.attention import PagedAttention

if TYPE_CHECKING:
    from drivetrain_inference.models.shared import SharedTokens


class PlainModel:
    """Computes logits with the module's own forward, one row of tokens of all sequences at once.

    Args:
        module: a causal language model; its parameters are read at every forward, so it may go on
            training in between.
        shared: the ranks that share out the tokens of each forward; ``None`` for one.

    Raises:
        ConfigError: its attention does not go through Transformers' interface, or needs a mask.
    """

    def __init__(self, module: nn.Module, shared: SharedTokens | None = None) -> None:
        self.module = module
        self._shared = shared
        self._attention = PagedAttention(module, shared)
        accepted = inspect.signature(module.forward).parameters
        self._picks, self._places = "logits_to_keep" in accepted, "position_ids" in accepted
        weight = next(module.parameters())
        self.device = weight.device
        self.dtype = self._embedding_dtype(weight)
        self.layers: list[LayerSpec] = self._attention.record(
            lambda: self._in_parts(self._whole([0, 0]), self._whole([0, 1]), None)
        )

    def __call__(self, cache: PagedCache, batch: RaggedBatch) -> torch.Tensor:
        """Logits [sequences, vocabulary] of the last token of each; float32."""

        def run() -> torch.Tensor:
            if batch.adapters:
                with adapted(batch.adapters, len(batch.tokens)):
                    return self._in_parts(batch.tokens, batch.positions, batch.last)
            return self._in_parts(batch.tokens, batch.positions, batch.last)

        logits: torch.Tensor = self._attention.over(cache, batch, run)
        return logits.float()

    def reference(self, tokens: list[int], adapter: Adapter | None = None) -> torch.Tensor:
        """Logits [tokens, vocabulary] of the module with its own attention and no cache."""
        positions = self._whole(list(range(len(tokens))))
        groups: list[Group] = [] if adapter is None else [(adapter, None)]
        with adapted(groups, len(tokens)):
            return self._forward(self._whole(tokens), positions, None).float()

    def close(self) -> None:
        """Leave Transformers as it was."""
        self._attention.close()

    @torch.no_grad()
    def _in_parts(
        self, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits of ``rows``, by all ranks that share the tokens; of this rank's tokens without."""
        shared = self._shared
        if shared is None:
            return self._forward(tokens, positions, rows)
        parts = shared.own(tokens), shared.own(positions)
        if rows is None:
            return self._forward(*parts, None)
        mine, places = shared.rows(rows, len(tokens))
        return shared.joined(self._forward(*parts, places), mine)

    @torch.no_grad()
    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None
    ) -> torch.Tensor:
        options: dict[str, Any] = {"use_cache": False, "return_dict": True}
        if rows is not None and self._picks:
            options["logits_to_keep"] = rows
        if self._places:
            options["position_ids"] = positions[None]
        self._attention.positions = positions
        training = self.module.training
        self.module.eval()
        try:
            found = self.module(input_ids=tokens[None], **options)
        finally:
            self.module.train(training)
        logits: torch.Tensor = found.logits[0]
        return logits if rows is None or self._picks else logits[rows]

    def _embedding_dtype(self, weight: torch.Tensor) -> torch.dtype:
        embedding = getattr(self.module, "get_input_embeddings", lambda: None)()
        found = getattr(embedding, "weight", weight)
        dtype: torch.dtype = found.dtype
        return dtype

    def _whole(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=self.device)
