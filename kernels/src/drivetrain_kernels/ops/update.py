"""What the fused optimizer updates have in common: arguments, checks, rounding, examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from drivetrain_kernels.checks import FLOATS, Checker
from drivetrain_kernels.op import Example, Refusal
from drivetrain_kernels.rounding import store

LEADING = "Tensor(a!) weights, Tensor gradient, "
"""First arguments of every update; its states follow."""
TRAILING = "Tensor(z!)? out, Tensor? scale_tensor, float scale, int? seed, "
"""Arguments after the states; the hyper-parameters follow.

``out`` is a low-precision copy of the weights to write in the same pass; the gradient used is
``gradient * scale * scale_tensor``; ``seed`` turns stochastic rounding on (bfloat16 storage only),
with stream 0 for the weights (or ``out``, where the weights are float32) and 1, 2, ... for states.
"""

Scale = float | torch.Tensor


def split_scale(scale: Scale) -> tuple[torch.Tensor | None, float]:
    """A scale as the schema takes it: a tensor that stays on its device, or a number."""
    return (scale, 1.0) if isinstance(scale, torch.Tensor) else (None, float(scale))


@dataclass(frozen=True)
class Operands:
    """The tensors of one update, in the dtype of the computation.

    Args:
        weights: values of the weights [n].
        gradient: scaled gradient [n].
        states: values of the states [n].
    """

    weights: torch.Tensor
    gradient: torch.Tensor
    states: tuple[torch.Tensor, ...]


def load(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    states: tuple[torch.Tensor, ...],
    scale_tensor: torch.Tensor | None,
    scale: float,
) -> Operands:
    """Convert to float32 (float64 if any tensor is) and scale the gradient."""
    wide = any(tensor.dtype == torch.float64 for tensor in (weights, gradient, *states))
    compute = torch.float64 if wide else torch.float32
    factor: Scale = torch.tensor(scale, dtype=compute, device=weights.device)
    if scale_tensor is not None:
        factor = factor * scale_tensor.reshape(()).to(compute)
    return Operands(
        weights.to(compute),
        gradient.to(compute) * factor,
        tuple(state.to(compute) for state in states),
    )


def store_update(
    targets: Mapping[str, torch.Tensor],
    values: Mapping[str, torch.Tensor],
    weights: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor | None,
    seed: int | None,
) -> None:
    """Round each value once and write it.

    Args:
        targets: states by name, in the order of their streams.
        values: what to write into them.
        weights: the weights and their new values.
        out: low-precision copy of the weights, or ``None``.
        seed: of stochastic rounding, or ``None``.
    """
    for stream, (name, target) in enumerate(targets.items(), start=1):
        store(target, values[name], seed, stream)
    store(weights[0], weights[1], seed, 0)
    if out is not None:
        store(out, weights[1], seed, 0)


def check_update(
    checker: Checker,
    weights: torch.Tensor,
    gradient: torch.Tensor,
    states: Mapping[str, torch.Tensor],
    out: torch.Tensor | None,
    scale_tensor: torch.Tensor | None,
    seed: int | None,
) -> None:
    """Check what all updates share."""
    tensors = {"weights": weights, "gradient": gradient, **states}
    if out is not None:
        tensors["out"] = out
    for name, tensor in tensors.items():
        checker.floating(tensor, name, FLOATS)
        checker.flat(tensor, name)
        checker.numel(tensor, name, weights.numel(), "as many as weights")
        checker.same_device(tensor, name, weights.device)
    checker.scale(scale_tensor, weights.device)
    checker.seed(seed, [tensor for name, tensor in tensors.items() if name != "gradient"])


# -- examples -------------------------------------------------------------------------------------

_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_DTYPES: tuple[tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None], ...] = (
    (_F32, _F32, _F32, None),
    (_F32, _BF16, _F32, _BF16),
    (_F32, _F16, _F32, _F16),
    (_F32, _F32, _BF16, _BF16),
    (_BF16, _BF16, _BF16, None),
    (_F16, _F16, _F32, None),
)
_SIZES = (0, 1, 7, 65, 1023, 5000)

Build = Callable[..., tuple[Any, ...]]


def update_examples(
    device: torch.device, initial: tuple[str, ...], hypers: list[tuple[Any, ...]]
) -> Iterator[Example]:
    """Every dtype combination, odd sizes, unaligned memory, scales, seeds.

    Args:
        device: where the tensors go.
        initial: how to fill each state: ``"normal"`` or ``"positive"``.
        hypers: hyper-parameters in schema order, used in turn.
    """
    turn = 0
    for weights, gradient, state, out in _DTYPES:
        for size in _SIZES:
            for offset in (0, 1) if size in (65, 1023) else (0,):
                tensors = Tensors(device, size, offset, seed=turn)
                scale = tensors.scalar(0.25) if turn % 3 == 1 else None
                stored = (weights, state) if out is None else (weights, state, out)
                rounds = turn % 2 == 1 and _F16 not in stored
                arguments = (
                    tensors.normal(weights),
                    tensors.normal(gradient),
                    *(tensors.filled(kind, state) for kind in initial),
                    None if out is None else tensors.normal(out),
                    scale,
                    0.5 if turn % 3 == 2 else 1.0,
                    12345 + 2**40 if rounds else None,
                    *hypers[turn % len(hypers)],
                )
                names = "-".join(str(dtype).removeprefix("torch.") for dtype in stored)
                label = f"{names}-{size}+{offset}" + ("-stochastic" if rounds else "")
                yield Example(label, arguments)
                turn += 1


def update_refusals(device: torch.device, states: int, hyper: tuple[Any, ...]) -> Iterator[Refusal]:
    """Calls of an update that must be refused."""
    tensors = Tensors(device, 8, 0, seed=0)

    def call(**replaced: Any) -> tuple[Any, ...]:
        named: dict[str, Any] = {"weights": tensors.normal(_F32), "gradient": tensors.normal(_F32)}
        named |= {f"state{index}": tensors.filled("positive", _F32) for index in range(states)}
        named |= {"out": None, "scale_tensor": None, "scale": 1.0, "seed": None}
        return (*(named | replaced).values(), *hyper)

    weights = tensors.normal(_F32)
    yield Refusal("short gradient", call(gradient=tensors.normal(_F32)[:7]), "gradient")
    yield Refusal("integer weights", call(weights=tensors.normal(_F32).int()), "weights")
    yield Refusal("matrix", call(weights=tensors.normal(_F32).view(2, 4)), "weights")
    strided = torch.zeros(16, device=device)[::2]
    yield Refusal("strided gradient", call(gradient=strided), "gradient")
    yield Refusal("out is weights", call(weights=weights, out=weights), "weights")
    yield Refusal("long scale", call(scale_tensor=torch.ones(2, device=device)), "scale_tensor")
    yield Refusal("negative seed", call(seed=-1), "seed")
    half = call(out=tensors.normal(_F16), seed=1)
    yield Refusal("stochastic float16", half, "seed")


class Tensors:
    """Makes reproducible tensors of one size; ``offset`` elements off the aligned start."""

    def __init__(self, device: torch.device, size: int, offset: int, seed: int) -> None:
        self._device, self._size, self._offset = device, size, offset
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, dtype: torch.dtype) -> torch.Tensor:
        """Standard normal values."""
        values = torch.randn(self._size + self._offset, generator=self._generator)
        return values.to(self._device, dtype)[self._offset :]

    def filled(self, kind: str, dtype: torch.dtype) -> torch.Tensor:
        """Normal values, or their magnitudes for ``"positive"``."""
        values = self.normal(dtype)
        return values.abs_() if kind == "positive" else values

    def scalar(self, value: float) -> torch.Tensor:
        """A 0-d float32 tensor."""
        return torch.tensor(value, device=self._device)
