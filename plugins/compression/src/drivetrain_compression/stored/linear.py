"""Linear layers and embeddings over a packed weight, with a low-rank change or without."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from drivetrain.contracts import WeightFormat
from drivetrain.errors import ConfigError
from drivetrain_compression.stored.kept_blocks import KeptBlocks, Product
from drivetrain_compression.stored.weight import StoredWeight


class StoredLinear(nn.Module):
    """``x W^T + bias`` with W packed and frozen.

    Args:
        weight: [out, in], or one that is packed already.
        bias: [out]; kept as it is.
        format: how to pack the weight.

    Raises:
        ConfigError: see :class:`StoredWeight`.
    """

    bias: nn.Parameter | None

    def __init__(
        self, weight: torch.Tensor, bias: nn.Parameter | None, format: WeightFormat, shards: int = 1
    ) -> None:
        super().__init__()
        self.weight = StoredWeight(weight, format, shards)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)

    @classmethod
    def over(cls, weight: StoredWeight, bias: nn.Parameter | None) -> StoredLinear:
        """A layer over a weight that is packed already."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.weight = weight
        made.out_features, made.in_features = weight.shape
        made.register_parameter("bias", bias)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        product = self.weight.product(x)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    @staticmethod
    def joined(layers: Sequence[StoredLinear]) -> Product:
        """One function [rows, in] -> [rows, out] of layers with one input, in eval mode.

        One product where formats allow it, over a copy of several weights; else what each layer
        returns, side by side. Serving calls some hundred of them for each token.
        """

        def each(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([layer(x) for layer in layers], dim=1)

        weights = [layer.weight for layer in layers]
        first = weights[0].format
        apart = any(layer.bias is not None or layer.weight.shards > 1 for layer in layers)
        if apart or not isinstance(first, KeptBlocks):
            return each
        formats, outputs = [w.format for w in weights], [w.shape[0] for w in weights]
        product = first.joined(formats, [w.parts() for w in weights], outputs)
        if product is None:
            return each
        return lambda x: product(x) if all(w.rounds_inputs for w in weights) else each(x)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class LoRALinear(nn.Module):
    """``x W^T + bias + (alpha / rank) B(A x)``: W and bias frozen, A and B trained.

    Hu et al. 2021, "LoRA", arXiv:2106.09685, section 4.1. A is drawn as a linear layer's weight
    (Kaiming-uniform, a = sqrt 5), B is zero, so the layer begins as W alone.

    Args:
        weight: W [out, in].
        bias: [out] or ``None``.
        format: how to pack W; ``None`` for a frozen parameter, which ZeRO partitions as any other.
        rank: rows of A, columns of B.
        alpha: see above.
        shards: 1, or the size of the world, each rank of which keeps a part of W.
        delayed: make A and B when :meth:`init_lora` is called.

    Raises:
        ConfigError: the rank is not positive; see also :class:`StoredWeight`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        format: WeightFormat | None,
        *,
        rank: int,
        alpha: float,
        shards: int = 1,
        delayed: bool = False,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ConfigError(f"lora_r: a rank of {rank}; it is at least 1")
        self.weight: StoredWeight | nn.Parameter
        if format is None:
            self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        else:
            self.weight = StoredWeight(weight, format, shards)
        self.out_features, self.in_features = weight.shape
        self.rank, self.lora_scaling_factor = rank, alpha / rank
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)
        self.lora_weight_1: nn.Linear | None = None
        self.lora_weight_2: nn.Linear | None = None
        if not delayed:
            self.init_lora()

    def init_lora(self) -> None:
        """Make A (``lora_weight_1``) and B (``lora_weight_2``), in the dtype of W, if not there."""
        if self.lora_weight_1 is not None:
            return
        place = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.lora_weight_1 = nn.Linear(self.in_features, self.rank, bias=False, **place)
        self.lora_weight_2 = nn.Linear(self.rank, self.out_features, bias=False, **place)
        nn.init.kaiming_uniform_(self.lora_weight_1.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_weight_2.weight)

    def full_weight(self) -> torch.Tensor:
        """W [out, in] in its dtype. Collective if it is in shards."""
        weight = self.weight
        return weight.dequantized() if isinstance(weight, StoredWeight) else weight.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out].

        Raises:
            ConfigError: there is no A and B yet.
        """
        if self.lora_weight_1 is None or self.lora_weight_2 is None:
            raise ConfigError("delay_lora_init: call deepspeed.linear.init_lora(model) first")
        if isinstance(self.weight, StoredWeight):
            base = self.weight.product(x)
        else:
            base = nn.functional.linear(x, self.weight)
        if self.bias is not None:
            base = base + self.bias.to(base.dtype)
        change: torch.Tensor = self.lora_weight_2(self.lora_weight_1(x))
        return base + self.lora_scaling_factor * change

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


class StoredEmbedding(nn.Module):
    """Rows of a packed, frozen table, which is unpacked in each forward.

    Not constructed: an ``nn.Embedding`` becomes one, and keeps its attributes.
    """

    weight: StoredWeight
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., embedding_dim]."""
        return nn.functional.embedding(ids, self.weight.dequantized())

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.num_embeddings}, {self.embedding_dim}"
