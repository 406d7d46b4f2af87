"""What an operator is: a schema, a PyTorch reference, and what implementations must satisfy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

NAMESPACE = "drivetrain"
"""Namespace of all operators in ``torch.ops``."""


@dataclass(frozen=True)
class Tolerance:
    """How far an implementation may be from the float64 reference.

    Args:
        relative: per output dtype, the factor of ``|expected|`` that a value may be off by.
        absolute: per output dtype, what it may be off by besides.
        mismatched: share of the elements of integer outputs that may differ at all (codes that
            fall on a rounding boundary); one element is always allowed when this is not 0.
    """

    relative: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {
            torch.float64: 1e-6,
            torch.float32: 1e-5,
            torch.float16: 2e-3,
            torch.bfloat16: 1.6e-2,
        }
    )
    absolute: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {
            torch.float64: 1e-9,
            torch.float32: 1e-6,
            torch.float16: 1e-5,
            torch.bfloat16: 1e-5,
        }
    )
    mismatched: float = 0.0


@dataclass(frozen=True)
class Example:
    """One call that every implementation must get right.

    Args:
        label: for test reports.
        arguments: the call, in schema order.
        tolerance: instead of the op's, where this call cannot be that near.
    """

    label: str
    arguments: tuple[Any, ...]
    tolerance: Tolerance | None = None


@dataclass(frozen=True)
class Refusal:
    """Arguments that must be refused with an :class:`~drivetrain_kernels.checks.ArgumentError`.

    Args:
        label: for test reports.
        arguments: the call, in schema order.
        argument: the argument that the message must name.
    """

    label: str
    arguments: tuple[Any, ...]
    argument: str


@dataclass(frozen=True)
class Op:
    """One operator of the ``drivetrain`` namespace.

    Args:
        name: name in ``torch.ops.drivetrain``.
        signature: torch schema without the name, all arguments positional and without defaults,
            e.g. ``"(Tensor(a!) weights, Tensor gradient, float lr) -> ()"``.
        reference: PyTorch implementation; runs on every device and computes in float64 when given
            float64 tensors.
        check: raises ``ArgumentError`` for arguments that the schema allows but the op does not;
            looks at dtypes, shapes and devices only, so that it also serves fake tensors.
        fake: makes outputs of the right shape and dtype; ``None`` for ops without outputs.
        examples: calls that every implementation must get right, on the given device.
        refusals: calls that must be refused.
        tolerance: how near an implementation must come.
        group: what it serves, ``"training"`` or ``"serving"``; a device may have kernels for one.
    """

    name: str
    signature: str
    reference: Callable[..., Any]
    check: Callable[..., None]
    examples: Callable[[torch.device], Iterator[Example]]
    refusals: Callable[[torch.device], Iterator[Refusal]]
    fake: Callable[..., Any] | None = None
    tolerance: Tolerance = field(default_factory=Tolerance)
    group: str = "training"

    @property
    def qualified_name(self) -> str:
        """``drivetrain::name``."""
        return f"{NAMESPACE}::{self.name}"

    @cached_property
    def schema(self) -> torch.FunctionSchema:
        """The parsed schema."""
        text = f"{self.qualified_name}{self.signature}"
        schema: torch.FunctionSchema = torch._C.parse_schema(text)
        return schema

    @cached_property
    def mutated(self) -> tuple[int, ...]:
        """Positions of the arguments that the op writes."""
        return tuple(
            position
            for position, argument in enumerate(self.schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )

    @cached_property
    def tensors(self) -> tuple[int, ...]:
        """Positions of the arguments that are tensors or lists of tensors."""
        return tuple(
            position
            for position, argument in enumerate(self.schema.arguments)
            if "Tensor" in str(argument.type)
        )

    def provider(self, device_type: str) -> str:
        """Who implements the op on ``device_type`` now: ``"reference"``, or a distribution."""
        from drivetrain_kernels.registry import registry

        return registry.implementation(self.name, device_type).provider

    def function(self, device_type: str) -> Callable[..., Any]:
        """The implementation itself on ``device_type``, without dispatch and without checks.

        For loops in which a call's own cost counts, and that have checked their arguments once.
        """
        from drivetrain_kernels.registry import registry

        return registry.function(self.name, device_type)

    @property
    def call(self) -> torch._ops.OpOverload[..., Any]:
        """The overload in ``torch.ops``, with dispatch."""
        packet: torch._ops.OpOverloadPacket[..., Any] = getattr(torch.ops.drivetrain, self.name)
        return packet.default
