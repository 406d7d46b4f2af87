"""Matrices in the form in which they are multiplied fastest here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from drivetrain_kernels import pack_panels
from drivetrain_kernels.ops.linear import PACKED_LINEAR
from drivetrain_kernels.registry import REFERENCE
from torch import nn

from drivetrain.contracts import WeightFormat
from drivetrain_inference.fast.structure import Layer, UnlikeError, is_packed
from drivetrain_inference.weights.bound import BoundFormat

Projection = Callable[[torch.Tensor], torch.Tensor]
"""[rows, in] -> [rows, out]."""

_PROBE = 3
"""Rows that a package's product of several layers is compared on."""


def joined(
    layers: Sequence[Layer], form: WeightFormat | None, *, invariant: bool = False
) -> Projection:
    """One projection that computes several layers of the same input, one after another.

    Args:
        layers: the layers; those that are packed multiply by themselves.
        form: how to pack the weight; ``None`` keeps its numbers.
        invariant: a row's bits must not depend on how many other rows there are.

    Raises:
        UnlikeError: a layer is packed already, and its product is to be another one; or that of
            several is not what they return.
    """
    if any(is_packed(each) for each in layers):
        return _by_their_package(layers, form, invariant)
    linears: Sequence[nn.Linear] = layers  # type: ignore[assignment]
    weight = torch.cat([each.weight.detach() for each in linears])
    biases = [getattr(each, "bias", None) for each in linears]
    bias = None
    if any(each is not None for each in biases):
        zeros = (weight.new_zeros(each.out_features) for each in linears)
        rows = [z if own is None else own.detach() for z, own in zip(zeros, biases, strict=True)]
        bias = torch.cat(rows)
    if form is not None:
        return _in_format(form, weight, bias, invariant)
    device = weight.device.type
    if PACKED_LINEAR.provider(device) != REFERENCE and weight.dtype != torch.float64:
        return _packed(weight, bias)
    return lambda x: nn.functional.linear(x, weight, bias)


def _by_their_package(
    layers: Sequence[Layer], form: WeightFormat | None, invariant: bool
) -> Projection:
    if form is not None:
        raise UnlikeError("its matrices are packed already, and are not packed again")
    if invariant:
        raise UnlikeError("its matrices are packed, and rows of their products are not invariant")
    if len({type(each) for each in layers}) > 1:
        raise UnlikeError("some matrices of one input are packed, and some are not")
    first: Any = layers[0]  # a protocol is no module for mypy
    found: Projection = first.joined(layers)
    _check_joined(found, layers)
    return found


@torch.no_grad()
def _check_joined(product: Projection, layers: Sequence[Any]) -> None:
    """Hold one product to what layers return, with inputs rounded if that is what they do.

    Logits are compared without rounding, so perhaps not by this product.
    """
    weight = layers[0].weight
    x = torch.randn(_PROBE, layers[0].in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, weight.dtype)
    wanted, found = torch.cat([layer(x) for layer in layers], dim=1).float(), product(x).float()
    bound = max(1e-4, 4 * torch.finfo(weight.dtype).eps) * float(wanted.abs().max())
    if found.shape != wanted.shape or not float((found - wanted).abs().max()) <= bound:
        raise UnlikeError(f"one product of {len(layers)} packed matrices is not what they return")


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Projection:
    multiply = PACKED_LINEAR.function(weight.device.type)
    panels, outputs = pack_panels(weight), len(weight)
    return lambda x: multiply(x, panels, bias, outputs)


def _in_format(
    form: WeightFormat, weight: torch.Tensor, bias: torch.Tensor | None, invariant: bool
) -> Projection:
    packed, outputs = form.pack(weight), len(weight)
    if isinstance(form, BoundFormat):
        product = form.bind(packed, outputs, invariant=invariant)
    else:

        def product(x: torch.Tensor) -> torch.Tensor:
            return form.multiply(x, packed, outputs)

    return product if bias is None else lambda x: product(x).add_(bias)
