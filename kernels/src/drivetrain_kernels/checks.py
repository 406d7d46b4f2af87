"""Argument checks: one error type, whose message names op, argument and expectation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from drivetrain.errors import DrivetrainError
from drivetrain_kernels.op import Op

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that kernels store; float64 passes too, for the reference."""
LOW_PRECISION = (torch.bfloat16, torch.float16)


class ArgumentError(DrivetrainError, ValueError):
    """An operator was called with arguments that it does not accept."""


class Checker:
    """Checks the arguments of one op; every method raises :class:`ArgumentError`."""

    def __init__(self, op: str) -> None:
        self._op = op

    def fail(self, argument: str, problem: str, expected: str) -> ArgumentError:
        """The error for ``argument``; raise it."""
        return ArgumentError(f"drivetrain::{self._op}: {argument} {problem}; expected {expected}")

    def flat(self, tensor: torch.Tensor, argument: str) -> None:
        """A contiguous vector."""
        if tensor.dim() != 1 or not tensor.is_contiguous():
            kind = "is not contiguous" if tensor.dim() == 1 else f"has {tensor.dim()} dimensions"
            raise self.fail(argument, kind, "a contiguous vector")

    def floating(
        self, tensor: torch.Tensor, argument: str, allowed: Sequence[torch.dtype] = FLOATS
    ) -> None:
        """One of ``allowed``, or float64 (which only the reference computes in)."""
        if tensor.dtype not in allowed and tensor.dtype != torch.float64:
            raise self.fail(argument, f"is {name_of(tensor.dtype)}", one_of(allowed))

    def dtype(self, tensor: torch.Tensor, argument: str, expected: torch.dtype) -> None:
        """Exactly ``expected``."""
        if tensor.dtype != expected:
            raise self.fail(argument, f"is {name_of(tensor.dtype)}", name_of(expected))

    def numel(self, tensor: torch.Tensor, argument: str, expected: int, why: str) -> None:
        """``expected`` elements; ``why`` says where the number comes from."""
        if tensor.numel() != expected:
            raise self.fail(argument, f"has {tensor.numel()} elements", f"{expected} ({why})")

    def same_device(self, tensor: torch.Tensor, argument: str, device: torch.device) -> None:
        """On ``device``."""
        if tensor.device != device:
            raise self.fail(argument, f"is on {tensor.device}", f"{device}")

    def number(self, value: float, argument: str, *, low: float, high: float | None = None) -> None:
        """A finite number in [low, high) (or at least ``low``)."""
        inside = value >= low and (value < high if high is not None else value < float("inf"))
        if not inside:
            bounds = f"in [{low:g}, {high:g})" if high is not None else f"finite and >= {low:g}"
            raise self.fail(argument, f"is {value!r}", f"a number {bounds}")

    def scale(self, scale: torch.Tensor | None, device: torch.device) -> None:
        """``None`` or a floating tensor of one element on ``device``."""
        if scale is None:
            return
        self.floating(scale, "scale_tensor")
        self.numel(scale, "scale_tensor", 1, "a 0-d tensor")
        self.same_device(scale, "scale_tensor", device)

    def seed(self, seed: int | None, stored: Sequence[torch.Tensor]) -> None:
        """Stochastic rounding is defined for bfloat16 storage."""
        if seed is None:
            return
        if not 0 <= seed < 2**63:
            raise self.fail("seed", f"is {seed}", "None or an integer in [0, 2**63)")
        if any(tensor.dtype == torch.float16 for tensor in stored):
            expected = "bfloat16 for stochastic rounding"
            raise self.fail("seed", "is set with float16 storage", expected)


def check_overlap(op: Op, arguments: Sequence[Any]) -> None:
    """Refuse a written tensor that shares memory with another argument.

    Only contiguous tensors are compared: the ranges of strided ones may interleave harmlessly.
    """
    written = set(op.mutated)
    ranges: list[tuple[int, int, int]] = []
    for position in op.tensors:
        value = arguments[position]
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if tensor is not None and tensor.numel() and tensor.is_contiguous():
                start = tensor.data_ptr()
                ranges.append((start, start + tensor.numel() * tensor.element_size(), position))
    ranges.sort()
    reach, reach_written = (0, -1), (0, -1)
    for start, end, position in ranges:
        is_written = position in written
        furthest = reach if is_written else reach_written
        if start < furthest[0]:
            first, second = (op.schema.arguments[at].name for at in sorted((furthest[1], position)))
            raise Checker(op.name).fail(first, f"shares memory with {second}", "disjoint memory")
        reach = max(reach, (end, position))
        if is_written:
            reach_written = max(reach_written, (end, position))


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def one_of(dtypes: Sequence[torch.dtype]) -> str:
    """``float32, bfloat16 or float16``."""
    names = [name_of(dtype) for dtype in dtypes]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
