"""Calls of the optimizer updates in optimizers.cu and lamb.cu."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int, c_int32, c_int64, c_uint64
from ctypes import c_void_p as pointer
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch

from drivetrain_kernels.gpu.call import DTYPES, Kernels, on_device
from drivetrain_kernels.ops.adam import corrections

CHUNK = 16384
"""Elements of one tensor that a block of threads takes at a time in LAMB."""


class _Update(Structure):
    """``Update`` of update.h."""

    _fields_ = [
        ("weights", pointer),
        ("gradient", pointer),
        ("states", pointer * 2),
        ("out", pointer),
        ("scale_tensor", pointer),
        ("count", c_int64),
        ("seed", c_uint64),
        ("weights_dtype", c_int32),
        ("gradient_dtype", c_int32),
        ("states_dtype", c_int32 * 2),
        ("out_dtype", c_int32),
        ("stochastic", c_int32),
        ("scale", c_float),
    ]


class _Lamb(Structure):
    """``Lamb`` of lamb.cu."""

    _fields_ = [
        ("u", _Update),
        ("chunks", pointer),
        ("first_chunks", pointer),
        ("norms", pointer),
        ("ratios", pointer),
        ("chunk_count", c_int64),
        ("tensor_count", c_int64),
        ("beta1", c_float),
        ("rest1", c_float),
        ("beta2", c_float),
        ("rest2", c_float),
        ("eps", c_float),
        ("decay", c_float),
        ("inverse_first", c_float),
        ("inverse_second", c_float),
        ("lr", c_float),
        ("low", c_double),
        ("high", c_double),
    ]


def _fill(
    update: _Update,
    weights: torch.Tensor,
    gradient: torch.Tensor,
    states: Sequence[torch.Tensor | None],
    out: torch.Tensor | None,
    scale_tensor: torch.Tensor | None,
    scale: float,
    seed: int | None,
) -> None:
    update.weights, update.weights_dtype = weights.data_ptr(), DTYPES[weights.dtype]
    update.gradient, update.gradient_dtype = gradient.data_ptr(), DTYPES[gradient.dtype]
    for index, state in enumerate(states):
        if state is not None:
            update.states[index] = state.data_ptr()
            update.states_dtype[index] = DTYPES[state.dtype]
    if out is not None:
        update.out, update.out_dtype = out.data_ptr(), DTYPES[out.dtype]
    if scale_tensor is not None:
        update.scale_tensor = scale_tensor.data_ptr()
    update.count, update.scale = weights.numel(), scale
    update.stochastic, update.seed = int(seed is not None), seed or 0


def _bind(
    name: str,
    states: int,
    argument_types: Sequence[Any],
    convert: Callable[..., Sequence[Any]] = lambda *hyper: hyper,
) -> Callable[[Kernels], Callable[..., None]]:
    """An update: ``convert`` turns the op's hyper-parameters into the kernel's."""

    def bind(kernels: Kernels) -> Callable[..., None]:
        function = kernels.function(name, [POINTER(_Update), *argument_types])

        def run(*arguments: Any) -> None:
            weights, gradient, *own = arguments[: 2 + states]
            out, scale_tensor, scale, seed, *hyper = arguments[2 + states :]
            factor = on_device(scale_tensor)
            update = _Update()
            _fill(update, weights, gradient, own, out, factor, scale, seed)
            function(weights.device, byref(update), *convert(*hyper))

        return run

    return bind


def _adam_hyper(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
    bias_correction: bool, step: int,
) -> Sequence[Any]:  # fmt: skip
    first, second = corrections(beta1, beta2, step, bias_correction)
    return lr, beta1, beta2, eps, weight_decay, decoupled, first, second


def bind_lamb(kernels: Kernels) -> Callable[..., torch.Tensor]:
    """``lamb``."""
    function = kernels.function("dt_lamb", [POINTER(_Lamb)])

    def lamb(*arguments: Any) -> torch.Tensor:
        weights, gradient, first_state, second_state, out, scale_tensor, scale, seed = arguments[:8]
        lr, beta1, beta2, eps, decay, low, high, correct, step, bounds = arguments[8:]
        device, factor = weights.device, on_device(scale_tensor)
        first, second = corrections(beta1, beta2, step, correct)
        chunks, first_chunks = lamb_chunks(tuple(bounds), device)
        norms = torch.empty(2 * len(chunks), dtype=torch.float64, device=device)
        ratios = torch.empty(len(bounds) - 1, device=device)
        call = _Lamb()
        states = (first_state, second_state)
        _fill(call.u, weights, gradient, states, out, factor, scale, seed)
        call.chunks, call.first_chunks = chunks.data_ptr(), first_chunks.data_ptr()
        call.norms, call.ratios = norms.data_ptr(), ratios.data_ptr()
        call.chunk_count, call.tensor_count = len(chunks), len(ratios)
        call.beta1, call.rest1, call.beta2, call.rest2 = beta1, 1 - beta1, beta2, 1 - beta2
        call.eps, call.decay, call.lr, call.low, call.high = eps, decay, lr, low, high
        call.inverse_first, call.inverse_second = 1 / first, 1 / second
        function(device, byref(call))
        return ratios

    return lamb


@lru_cache(maxsize=256)
def lamb_chunks(bounds: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces (start, count, tensor) of the tensors, and the first of each tensor; on the device.

    Buckets keep their bounds, so the tables are made and copied once.
    """
    pieces = [
        (at, min(CHUNK, end - at), index)
        for index, (start, end) in enumerate(pairwise(bounds))
        for at in range(start, end, CHUNK)
    ]
    counts = (-(-(end - start) // CHUNK) for start, end in pairwise(bounds))
    first = list(accumulate(counts, initial=0))
    chunks = torch.tensor(pieces, dtype=torch.int64).reshape(-1, 3)
    return chunks.to(device), torch.tensor(first, dtype=torch.int64).to(device)


BINDINGS: dict[str, Callable[[Kernels], Callable[..., Any]]] = {
    "adagrad": _bind("dt_adagrad", 1, [c_double] * 3),
    "adam": _bind("dt_adam", 2, [*[c_double] * 5, c_int, c_double, c_double], _adam_hyper),
    "lamb": bind_lamb,
    "lion": _bind("dt_lion", 1, [c_double] * 4),
    "sgd": _bind("dt_sgd", 1, [*[c_double] * 4, c_int, c_int]),
}
"""Op name -> what makes the function, given the kernels."""
