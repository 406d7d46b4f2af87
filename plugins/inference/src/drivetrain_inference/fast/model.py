"""A recognised decoder as a short loop over operators: no module's code, no call without work.

The rows of a forward are tokens of all sequences. For the last norm and the head only the last
token of each sequence counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from drivetrain_kernels.ops.decoder import ADD_RMS_NORM, GATED_ACTIVATION, ROTARY_TO_CACHE
from drivetrain_kernels.ops.paged_attention import PAGED_ATTENTION
from torch import nn

from drivetrain.contracts import WeightFormat
from drivetrain_inference.cache.paged import LayerSpec, PagedCache, RaggedBatch
from drivetrain_inference.fast.projections import Projection, joined
from drivetrain_inference.fast.structure import Block, Structure, UnlikeError, norm_eps


@dataclass(frozen=True)
class _Layer:
    norms: tuple[torch.Tensor, torch.Tensor]
    eps: tuple[float, float]
    query_key_value: Projection
    output: Projection
    gate_up: Projection
    down: Projection

    @classmethod
    def of(cls, block: Block, project: Callable[[Sequence[nn.Linear]], Projection]) -> _Layer:
        query, key, value, output = block.attention
        gate, up, down = block.gated
        first, second = block.norms
        weights = (_detached(first), _detached(second))
        return cls(
            weights,
            (norm_eps(first), norm_eps(second)),
            query_key_value=project((query, key, value)),
            output=project((output,)),
            gate_up=project((gate, up)),
            down=project((down,)),
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
        self.layers = layers
        self._embedding = structure.embedding.weight.detach()
        self._padding = structure.embedding.padding_idx
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

    @torch.no_grad()
    def __call__(self, cache: PagedCache, batch: RaggedBatch) -> torch.Tensor:
        """Logits [sequences, vocabulary] of the last token of each; float32."""
        hidden = self._embedding.index_select(0, batch.tokens)
        turns = self._cosine[batch.positions], self._sine[batch.positions]
        delta: torch.Tensor | None = None
        for number, layer in enumerate(self._blocks):
            spec, keys, values = self.layers[number], cache.keys[number], cache.values[number]
            normed = self._add_norm(hidden, delta, layer.norms[0], layer.eps[0])
            qkv = layer.query_key_value(normed)
            self._rotate(qkv, *turns, keys, values, batch.slots)
            query = qkv.view(len(qkv), -1, spec.dim)[:, : -2 * spec.kv_heads]
            attended = self._attend(
                query, keys, values, batch.tables, batch.starts, batch.lengths,
                spec.scale, spec.window, 0.0, None,
            )  # fmt: skip
            delta = layer.output(attended.view(len(qkv), -1))
            normed = self._add_norm(hidden, delta, layer.norms[1], layer.eps[1])
            delta = layer.down(self._gate(layer.gate_up(normed), self._kind))
        assert delta is not None
        hidden, delta = hidden[batch.last], delta[batch.last]
        logits: torch.Tensor = self._head(self._add_norm(hidden, delta, self._norm, self._eps))
        return logits.float()


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
