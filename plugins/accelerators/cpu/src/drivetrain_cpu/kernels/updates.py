"""Calls of the optimizer updates in optimizers.cpp and reductions.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int, c_int32, c_int64, c_uint64
from ctypes import c_void_p as pointer
from typing import Any

import torch
from drivetrain_kernels.ops.adam import corrections

from drivetrain_cpu.kernels.call import DTYPES, Bind, product, succeed, threads_for


class _Update(Structure):
    """``Update`` of optimizers.cpp."""

    _fields_ = [
        ("weights", pointer),
        ("gradient", pointer),
        ("states", pointer * 2),
        ("out", pointer),
        ("count", c_int64),
        ("seed", c_uint64),
        ("weights_dtype", c_int32),
        ("gradient_dtype", c_int32),
        ("states_dtype", c_int32 * 2),
        ("out_dtype", c_int32),
        ("stochastic", c_int32),
        ("threads", c_int32),
        ("scale", c_float),
    ]


class _Lamb(Structure):
    """``Lamb`` of reductions.cpp."""

    _fields_ = [
        ("weights", pointer),
        ("gradient", pointer),
        ("states", pointer * 2),
        ("out", pointer),
        ("seed", c_uint64),
        ("weights_dtype", c_int32),
        ("gradient_dtype", c_int32),
        ("states_dtype", c_int32 * 2),
        ("out_dtype", c_int32),
        ("stochastic", c_int32),
        ("threads", c_int32),
        ("scale", c_float),
        ("beta1", c_float),
        ("rest1", c_float),
        ("beta2", c_float),
        ("rest2", c_float),
        ("eps", c_float),
        ("decay", c_float),
        ("inverse_first", c_float),
        ("inverse_second", c_float),
    ]


def _fill(
    update: _Update | _Lamb,
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
    update.stochastic, update.seed = int(seed is not None), seed or 0
    update.threads = threads_for(weights.numel())
    update.scale = product(scale_tensor, scale)


def _split_update(states: int) -> Callable[[Sequence[Any]], tuple[_Update, Sequence[Any]]]:
    """Answers a function from an op's arguments to the kernel's structure and what follows it."""

    def split(arguments: Sequence[Any]) -> tuple[_Update, Sequence[Any]]:
        update = _Update()
        weights, gradient, own = arguments[0], arguments[1], arguments[2 : 2 + states]
        rest = arguments[2 + states :]
        _fill(update, weights, gradient, own, *rest[:4])
        update.count = weights.numel()
        return update, rest[4:]

    return split


def bind_adam(library: ctypes.CDLL) -> Callable[..., None]:
    """``adam``."""
    function, split = library.dt_adam, _split_update(2)
    function.argtypes = [POINTER(_Update), *[c_double] * 5, c_int, c_double, c_double]
    function.restype = None

    def adam(*arguments: Any) -> None:
        update, hyper = split(arguments)
        *numbers, decoupled, bias_correction, step = hyper
        first, second = corrections(numbers[1], numbers[2], step, bias_correction)
        function(byref(update), *numbers, decoupled, first, second)

    return adam


def bind_elementwise(
    name: str, states: int, argument_types: list[Any]
) -> Callable[[ctypes.CDLL], Callable[..., None]]:
    """An update whose hyper-parameters go to the kernel as they are."""

    def bind(library: ctypes.CDLL) -> Callable[..., None]:
        function, split = library[name], _split_update(states)
        function.argtypes = [POINTER(_Update), *argument_types]
        function.restype = None

        def run(*arguments: Any) -> None:
            update, hyper = split(arguments)
            function(byref(update), *hyper)

        return run

    return bind


def bind_lamb(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``lamb``."""
    function = library.dt_lamb
    function.argtypes = [
        POINTER(_Lamb),
        POINTER(c_int64),
        c_int64,
        *[c_double] * 3,
        POINTER(c_float),
    ]
    function.restype = c_int

    def lamb(*arguments: Any) -> torch.Tensor:
        update = _Lamb()
        _fill(update, arguments[0], arguments[1], arguments[2:4], *arguments[4:8])
        lr, beta1, beta2, eps, decay, low, high, correct, step, bounds = arguments[8:]
        first, second = corrections(beta1, beta2, step, correct)
        update.beta1, update.rest1 = beta1, 1 - beta1
        update.beta2, update.rest2 = beta2, 1 - beta2
        update.eps, update.decay = eps, decay
        update.inverse_first, update.inverse_second = 1 / first, 1 / second
        ratios = torch.empty(len(bounds) - 1)
        edges = (c_int64 * len(bounds))(*bounds)
        target = ctypes.cast(ratios.data_ptr(), POINTER(c_float))
        succeed(function(byref(update), edges, len(bounds) - 1, lr, low, high, target))
        return ratios

    return lamb


BINDINGS: dict[str, Bind] = {
    "adagrad": bind_elementwise("dt_adagrad", 1, [c_double] * 3),
    "adam": bind_adam,
    "lamb": bind_lamb,
    "lion": bind_elementwise("dt_lion", 1, [c_double] * 4),
    "sgd": bind_elementwise("dt_sgd", 1, [c_double] * 4 + [c_int] * 2),
}
"""Op name -> what makes the function, given the library."""
