"""A recognised decoder as a short loop over operators: no module's code, no call without work.

The rows of a forward are tokens of all sequences. For the last norm and the head only the last
token of each sequence counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from drivetrain_kernels.ops.decoder import ADD_RMS_NORM, GATED_ACTIVATION, ROTARY_TO_CACHE
from drivetrain_kernels.ops.paged_attention import PAGED_ATTENTION
from drivetrain_kernels.registry import REFERENCE

from drivetrain.contracts import WeightFormat
from drivetrain_inference.adapters.adapter import Group, Part, add_changes
from drivetrain_inference.alone import as_float32
from drivetrain_inference.cache.paged import LayerSpec, PagedCache, RaggedBatch
from drivetrain_inference.fast.decode import Capture, Decodes
from drivetrain_inference.fast.projections import Projection, joined
from drivetrain_inference.fast.structure import Block, Layer, Structure, UnlikeError, norm_eps

Turns = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines [tokens, rotated / 2], float32."""


@dataclass(frozen=True)
class _Joined:
    """Layers of one input: their product, and where the results of each lie in it."""

    product: Projection
    parts: tuple[Part, ...]

    @classmethod
    def of(
        cls, layers: Sequence[Layer], project: Callable[[Sequence[Layer]], Projection]
    ) -> _Joined:
        parts, start = list[Part](), 0
        for layer in layers:
            module: Any = layer  # a protocol is no module for mypy
            parts.append((module, start, start + layer.out_features))
            start += layer.out_features
        return cls(project(layers), tuple(parts))

    def __call__(self, x: torch.Tensor, adapters: Sequence[Group]) -> torch.Tensor:
        y = self.product(x)
        if adapters:
            add_changes(y, x, self.parts, adapters)
        return y


@dataclass(frozen=True)
class _Layer:
    norms: tuple[torch.Tensor, torch.Tensor]
    eps: tuple[float, float]
    query_key_value: _Joined
    output: _Joined
    gate_up: _Joined
    down: _Joined

    @classmethod
    def of(cls, block: Block, project: Callable[[Sequence[Layer]], Projection]) -> _Layer:
        query, key, value, output = block.attention
        gate, up, down = block.gated
        first, second = block.norms
        weights = (_detached(first), _detached(second))
        return cls(
            weights,
            (norm_eps(first), norm_eps(second)),
            query_key_value=_Joined.of((query, key, value), project),
            output=_Joined.of((output,), project),
            gate_up=_Joined.of((gate, up), project),
            down=_Joined.of((down,), project),
        )


class FastModel:
    """Computes what the module would, from copies of its weights.

    Args:
        structure: the decoder's parts.
        layers: what its attention modules do, in their order.
        context: positions that rotations are made for.
        form: format of the blocks' matrices; ``None``: as they are.
        head: whether the matrix that makes logits has that format, too.
        invariant: a row's bits must not depend on how many other rows there are.

    Raises:
        UnlikeError: attention is of a kind that this way does not know.
    """

    def __init__(
        self,
        structure: Structure,
        layers: list[LayerSpec],
        *,
        context: int,
        form: WeightFormat | None = None,
        head: bool = False,
        invariant: bool = False,
    ) -> None:
        if len(layers) != len(structure.blocks):
            raise UnlikeError(f"{len(layers)} modules attend in {len(structure.blocks)} layers")
        for spec in layers:
            if spec.softcap or spec.sinks or spec.dim != spec.value_dim:
                raise UnlikeError("its attention has soft caps, sinks or values of another width")
        self.layers, self.context, self.exact = layers, context, form is None
        self._embedding = structure.embedding.weight.detach()
        self.dtype, self.device = self._embedding.dtype, self._embedding.device
        self._cosine, self._sine = _rotations(structure, self._embedding, context)
        project = partial(joined, form=form, invariant=invariant)
        self._blocks = [_Layer.of(block, project) for block in structure.blocks]
        self._norm, self._eps = _detached(structure.norm), norm_eps(structure.norm)
        self._head = joined((structure.head,), form if head else None, invariant=invariant)
        self._kind = structure.activation
        kind = self.device.type
        self._add_norm = ADD_RMS_NORM.function(kind)
        self._rotate = ROTARY_TO_CACHE.function(kind)
        self._attend = PAGED_ATTENTION.function(kind)
        self._gate = GATED_ACTIVATION.function(kind)
        self._decodes: Decodes | None = None

    def capture_with(self, capture: Capture) -> None:
        """Have forwards of few sequences with one token each repeated by the accelerator.

        Where kernels are missing (off the CPU), references ask devices for numbers, which nothing
        repeats, so nothing is captured.
        """
        if PAGED_ATTENTION.provider(self.device.type) != REFERENCE:
            self._decodes = Decodes(self, capture)

    @property
    def captures(self) -> bool:
        """Whether forwards of few sequences are given to the accelerator to repeat."""
        return self._decodes is not None

    def close(self) -> None:
        """Forget what was captured, which keeps the cache's memory."""
        self._decodes = None

    @torch.no_grad()
    def __call__(self, cache: PagedCache, batch: RaggedBatch) -> torch.Tensor:
        """Logits [sequences, vocabulary] of the last token of each; float32."""
        if self._decodes is not None:
            logits = self._decodes(cache, batch)
            if logits is not None:
                return as_float32(logits)  # the next replay writes over them
        hidden, delta = self.layers_of(self.embedded(batch), self.turns(batch), cache, batch)
        return self.logits(hidden[batch.last], delta[batch.last]).float()

    def embedded(self, batch: RaggedBatch, out: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings [tokens, dim]."""
        return torch.index_select(self._embedding, 0, batch.tokens, out=out)

    def turns(self, batch: RaggedBatch, out: Turns | None = None) -> Turns:
        """How queries and keys are rotated."""
        cosine, sine = (None, None) if out is None else out
        return (
            torch.index_select(self._cosine, 0, batch.positions, out=cosine),
            torch.index_select(self._sine, 0, batch.positions, out=sine),
        )

    def layers_of(
        self, hidden: torch.Tensor, turns: Turns, cache: PagedCache, batch: RaggedBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All blocks; of ``tokens`` and ``positions`` of the batch nothing is read.

        Args:
            hidden: embeddings [tokens, dim]; written.
            turns: of each token.
            cache: written in the slots of the batch.
            batch: where the tokens are.

        Returns:
            ``hidden`` and what the last layer adds to it.
        """
        delta: torch.Tensor | None = None
        adapters = batch.adapters
        for number, layer in enumerate(self._blocks):
            spec, keys, values = self.layers[number], cache.keys[number], cache.values[number]
            scales = cache.scales[number]
            normed = self._add_norm(hidden, delta, layer.norms[0], layer.eps[0])
            qkv = layer.query_key_value(normed, adapters)
            self._rotate(qkv, *turns, keys, values, batch.slots, *scales)
            query = qkv.view(len(qkv), -1, spec.dim)[:, : -2 * spec.kv_heads]
            attended = self._attend(
                query, keys, values, batch.tables, batch.starts, batch.lengths,
                spec.scale, spec.window, 0.0, None, *scales,
            )  # fmt: skip
            delta = layer.output(attended.view(len(qkv), -1), adapters)
            normed = self._add_norm(hidden, delta, layer.norms[1], layer.eps[1])
            gated = self._gate(layer.gate_up(normed, adapters), self._kind)
            delta = layer.down(gated, adapters)
        assert delta is not None
        return hidden, delta

    def logits(self, hidden: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] of what :meth:`layers_of` returns, in the model's dtype."""
        return self._head(self._add_norm(hidden, delta, self._norm, self._eps))


def _detached(norm: torch.nn.Module) -> torch.Tensor:
    weight = norm.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().contiguous()


@torch.no_grad()
def _rotations(
    structure: Structure, like: torch.Tensor, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(context, device=like.device)[None]
    wide = torch.zeros(1, 1, 1, dtype=torch.float32, device=like.device)
    parts = []
    for part in structure.rotary(wide, positions):
        first, second = part[0].float().chunk(2, dim=1)
        if not torch.equal(first, second):
            raise UnlikeError("its rotation turns neighbours, not halves")
        parts.append(first.contiguous())
    return parts[0], parts[1]
