"""The layers of a module that multiply by a matrix, whatever their classes are called."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call

Kind = Literal["linear", "transposed", "embedding"]

_TRIED = 1 << 22
"""Most elements of a weight with which the forward of an unknown class is tried."""


@dataclass(frozen=True, eq=False)
class Product:
    """A layer whose output features are rows (or columns) of one matrix.

    Args:
        path: in the model.
        module: the layer.
        kind: ``linear`` has its weight as [out, in], ``transposed`` (GPT-2's ``Conv1D``) as
            [in, out], and ``embedding`` as [rows, out].
    """

    path: str
    module: nn.Module
    kind: Kind

    @property
    def weight(self) -> nn.Parameter:
        """The matrix."""
        weight: nn.Parameter = self.module._parameters["weight"]  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """One number for each output feature, if there are any."""
        return self.module._parameters.get("bias")

    @property
    def out_dim(self) -> int:
        """Dimension of the weight that output features lie along."""
        return 0 if self.kind == "linear" else 1

    @property
    def outputs(self) -> int:
        """Number of output features."""
        return self.weight.shape[self.out_dim]

    @property
    def inputs(self) -> int:
        """Number of input features; rows of the table of an embedding."""
        return self.weight.shape[1 - self.out_dim]


def find_products(model: nn.Module) -> list[Product]:
    """All layers that multiply, in the order of ``named_modules``; each module once."""
    kinds: dict[tuple[object, ...], Kind | None] = {}
    found = []
    for path, module in model.named_modules():
        kind = _kind(module, kinds)
        if kind is not None:
            found.append(Product(path, module, kind))
    return found


def shared_weights(model: nn.Module) -> set[int]:
    """Identities of parameters that several modules have."""
    count = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    return {key for key, times in count.items() if times > 1}


def _kind(module: nn.Module, kinds: dict[tuple[object, ...], Kind | None]) -> Kind | None:
    weight, rest = module._parameters.get("weight"), module._parameters.keys() - {"weight", "bias"}
    if weight is None or weight.dim() != 2 or rest or module._modules or module._buffers:
        return None
    if not weight.is_floating_point() or "forward" in module.__dict__:
        return None
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.sparse and not module.scale_grad_by_freq
        return "embedding" if plain else None
    if type(module).forward is nn.Linear.forward:
        return "linear"
    key = (type(module), weight.shape[0] == weight.shape[1], module._parameters.get("bias") is None)
    if key not in kinds and weight.numel() <= _TRIED:
        kinds[key] = _tried(module)
    return kinds.get(key)


def _tried(module: nn.Module) -> Kind | None:
    """What the forward of a layer computes with a matrix made for it."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in module.named_parameters()
    }
    weight, bias = tensors["weight"], tensors.get("bias")
    kinds: tuple[Kind, ...] = ("linear", "transposed")
    for kind in kinds:
        matrix = weight if kind == "linear" else weight.T
        if bias is not None and bias.shape != (matrix.shape[0],):
            continue
        x = torch.randn(2, 3, matrix.shape[1], generator=generator, dtype=torch.float64)
        found = _result(module, tensors, x)
        if found is not None and torch.allclose(found, nn.functional.linear(x, matrix, bias)):
            return kind
    return None


def _result(
    module: nn.Module, tensors: dict[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor | None:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            found: Any = functional_call(module, tensors, (x,))
        except Exception as error:  # noqa: BLE001 - of any class: the layer is then of another kind
            del error
            return None
    shape = x.shape[:-1]
    fits = isinstance(found, torch.Tensor) and found.shape[:-1] == shape
    return found if fits and found.dtype == x.dtype else None
