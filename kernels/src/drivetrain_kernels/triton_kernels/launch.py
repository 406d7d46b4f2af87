"""The ops, by name, as calls of Triton kernels; arguments in schema order."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

from drivetrain_kernels.gpu.call import on_device
from drivetrain_kernels.gpu.quantization import FORMATS
from drivetrain_kernels.gpu.updates import lamb_chunks
from drivetrain_kernels.ops.adam import corrections
from drivetrain_kernels.ops.block_format import blocks_of, code_count, format_of
from drivetrain_kernels.ops.copy import CAST_COPY
from drivetrain_kernels.ops.quantize import QUANTIZE, REDUCE
from drivetrain_kernels.triton_kernels import quantization, reductions, signs, updates
from drivetrain_kernels.triton_kernels.block_sparse_launch import (
    block_sparse_attention,
    block_sparse_attention_backward,
)
from drivetrain_kernels.triton_kernels.values import BLOCK

__all__ = ["block_sparse_attention", "block_sparse_attention_backward"]

_TILE = 4096
"""Values that one program quantises, unless one block is larger."""
_LARGEST_BLOCK = 65536
"""Blocks larger than a program can hold are left to the reference."""
_SUMS = 512
"""Programs that share the norm of one tensor."""


def adam(
    weights: torch.Tensor, gradient: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
    out: torch.Tensor | None, scale_tensor: torch.Tensor | None, scale: float, seed: int | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
    bias_correction: bool, step: int,
) -> None:  # fmt: skip
    """``adam``."""
    first, second = corrections(beta1, beta2, step, bias_correction)
    coupled, keep = (0.0, 1 - lr * weight_decay) if decoupled else (weight_decay, 1.0)
    _update(
        updates.adam_kernel, (weights, gradient, exp_avg, exp_avg_sq, out), scale_tensor, scale,
        seed, beta1, 1 - beta1, beta2, 1 - beta2, eps, coupled, keep, 1 / second, lr / first,
    )  # fmt: skip


def adagrad(
    weights: torch.Tensor, gradient: torch.Tensor, state_sum: torch.Tensor,
    out: torch.Tensor | None, scale_tensor: torch.Tensor | None, scale: float, seed: int | None,
    lr: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """``adagrad``."""
    tensors = (weights, gradient, state_sum, out)
    _update(updates.adagrad_kernel, tensors, scale_tensor, scale, seed, lr, eps, weight_decay)


def lion(
    weights: torch.Tensor, gradient: torch.Tensor, exp_avg: torch.Tensor,
    out: torch.Tensor | None, scale_tensor: torch.Tensor | None, scale: float, seed: int | None,
    lr: float, beta1: float, beta2: float, weight_decay: float,
) -> None:  # fmt: skip
    """``lion``."""
    _update(
        updates.lion_kernel, (weights, gradient, exp_avg, out), scale_tensor, scale, seed,
        lr, beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay,
    )  # fmt: skip


def sgd(
    weights: torch.Tensor, gradient: torch.Tensor, momentum_buffer: torch.Tensor | None,
    out: torch.Tensor | None, scale_tensor: torch.Tensor | None, scale: float, seed: int | None,
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool, first: bool,
) -> None:  # fmt: skip
    """``sgd``."""
    _update(
        updates.sgd_kernel, (weights, gradient, momentum_buffer, out), scale_tensor, scale, seed,
        lr, momentum, 1 - dampening, weight_decay, nesterov, first,
    )  # fmt: skip


def lamb(
    weights: torch.Tensor, gradient: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
    out: torch.Tensor | None, scale_tensor: torch.Tensor | None, scale: float, seed: int | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, low: float, high: float,
    bias_correction: bool, step: int, bounds: list[int],
) -> torch.Tensor:  # fmt: skip
    """``lamb``."""
    device = weights.device
    first, second = corrections(beta1, beta2, step, bias_correction)
    chunks, first_chunks = lamb_chunks(tuple(bounds), device)
    norms = torch.empty(2 * len(chunks), dtype=torch.float64, device=device)
    ratios = torch.empty(len(bounds) - 1, device=device)
    hyper = (eps, weight_decay, 1 / first, 1 / second, seed is not None, BLOCK)
    halves = _halves(seed)
    with _current(device):
        if len(chunks):
            _run(
                reductions.moments_kernel, len(chunks), weights, gradient, exp_avg, exp_avg_sq,
                on_device(scale_tensor), float(scale), *halves, chunks, norms,
                beta1, 1 - beta1, beta2, 1 - beta2, *hyper,
            )  # fmt: skip
        if len(ratios):
            _run(reductions.ratios_kernel, len(ratios), norms, first_chunks, ratios, low, high, 128)
        if len(chunks):
            _run(
                reductions.step_kernel, len(chunks), weights, exp_avg, exp_avg_sq, out, *halves,
                chunks, ratios, float(lr), *hyper,
            )  # fmt: skip
    return ratios


def cast_copy(
    target: torch.Tensor, source: torch.Tensor, scale_tensor: torch.Tensor | None, scale: float,
    seed: int | None,
) -> None:  # fmt: skip
    """``cast_copy``; strided tensors are left to the reference."""
    if not (target.is_contiguous() and source.is_contiguous()):
        torch.no_grad()(CAST_COPY.reference)(target, source, scale_tensor, scale, seed)
        return
    scaled = scale_tensor is not None or scale != 1.0
    _update(updates.cast_kernel, (target, source), scale_tensor, scale, seed, scaled)


def norm_squared(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """``norm_squared``."""
    device = tensors[0].device if tensors else torch.device("cpu")
    dense = [tensor.contiguous() for tensor in tensors if tensor.numel()]
    programs = [min(_SUMS, triton.cdiv(tensor.numel(), BLOCK)) for tensor in dense]
    sums = torch.zeros(sum(programs), dtype=torch.float64, device=device)
    with _current(device):
        for tensor, part in zip(dense, torch.split(sums, programs), strict=True):
            _run(reductions.norm_kernel, len(part), tensor, part, tensor.numel(), BLOCK)
    total = sums.sum()
    return total, ~torch.isfinite(total)


def quantize(
    values: torch.Tensor, format: str, block: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize``."""
    if block > _LARGEST_BLOCK:
        return QUANTIZE.reference(values, format, block, symmetric)  # type: ignore[no-any-return]
    kind, numel, device = format_of(format, symmetric), values.numel(), values.device
    codes = torch.empty(code_count(numel, kind), dtype=kind.dtype, device=device)
    parameters = torch.empty(blocks_of(numel, block), kind.parameters, device=device)
    rows, width = _tile_of(block)
    with _current(device):
        if numel:
            _run(
                quantization.quantize_kernel, triton.cdiv(len(parameters), rows),
                values.contiguous(), codes.view(torch.uint8), parameters, numel, block,
                FORMATS[format, symmetric], rows, width,
            )  # fmt: skip
    return codes, parameters


def dequantize(
    codes: torch.Tensor, parameters: torch.Tensor, format: str, block: int, symmetric: bool,
    numel: int, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """``dequantize``."""
    values = torch.empty(numel, dtype=dtype, device=codes.device)
    with _current(codes.device):
        if numel:
            _run(
                quantization.dequantize_kernel, triton.cdiv(numel, BLOCK), codes.view(torch.uint8),
                parameters, values, numel, block, FORMATS[format, symmetric], BLOCK,
            )  # fmt: skip
    return values


def dequantize_reduce_quantize(
    codes: torch.Tensor, parameters: torch.Tensor, format: str, block: int, symmetric: bool,
    numel: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``dequantize_reduce_quantize``."""
    call = (codes, parameters, format, block, symmetric, numel, scale)
    if block > _LARGEST_BLOCK:
        return REDUCE.reference(*call)  # type: ignore[no-any-return]
    summed, own = torch.empty_like(codes[0]), torch.empty_like(parameters[0])
    rows, width = _tile_of(block)
    with _current(codes.device):
        if numel:
            _run(
                quantization.reduce_kernel, triton.cdiv(len(own), rows), codes.view(torch.uint8),
                parameters, len(codes), float(scale), summed.view(torch.uint8), own, numel, block,
                summed.numel(), own.numel(), FORMATS[format, symmetric], rows, width,
            )  # fmt: skip
    return summed, own


def pack_signs(values: torch.Tensor, scale: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """``pack_signs``."""
    count = values.numel()
    packed = torch.empty(triton.cdiv(count, 8), dtype=torch.uint8, device=values.device)
    with _current(values.device):
        if count:
            block = BLOCK // 8
            programs = triton.cdiv(len(packed), block)
            _run(signs.pack_signs_kernel, programs, values, scale, error, packed, count, block)
    return packed


def mean_signs(packed: torch.Tensor, scales: torch.Tensor, numel: int) -> torch.Tensor:
    """``mean_signs``."""
    mean = torch.empty(numel, device=packed.device)
    with _current(packed.device):
        if numel:
            _run(
                signs.mean_signs_kernel, triton.cdiv(numel, BLOCK), packed, scales, mean,
                len(packed), packed.shape[1], numel, BLOCK,
            )  # fmt: skip
    return mean


def _update(
    kernel: Any, tensors: tuple[torch.Tensor | None, ...], scale_tensor: torch.Tensor | None,
    scale: float, seed: int | None, *hyper: float,
) -> None:  # fmt: skip
    """Run an elementwise kernel over the elements of the first tensor."""
    assert tensors[0] is not None
    count, device = tensors[0].numel(), tensors[0].device
    factor = on_device(scale_tensor)
    if count:
        with _current(device):
            _run(
                kernel, triton.cdiv(count, BLOCK), *tensors, factor, count, float(scale),
                *_halves(seed), *hyper, seed is not None, BLOCK,
            )  # fmt: skip


def _run(kernel: Any, programs: int, *arguments: Any) -> None:
    # Contracted products would round differently on every kind of device.
    kernel[programs,](*arguments, enable_fp_fusion=False)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(device.type).device(device)  # type: ignore[no-any-return]


def _tile_of(block: int) -> tuple[int, int]:
    width = triton.next_power_of_2(block)
    return max(1, _TILE // width), width


def _halves(seed: int | None) -> tuple[int, int]:
    """The seed as two signed 32-bit integers, so that its size does not change the signature."""
    words = (seed or 0).to_bytes(8, "little")
    low, high = (int.from_bytes(words[at : at + 4], "little", signed=True) for at in (0, 4))
    return low, high
