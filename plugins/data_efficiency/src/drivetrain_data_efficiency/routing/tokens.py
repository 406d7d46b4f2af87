"""Take tokens out of hidden states and put them back, as operators of the kernel registry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from drivetrain_kernels import ArgumentError, Example, Op, Refusal, registry

_GROUP = "routing"


def gather_tokens(hidden: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The kept tokens of every sample; differentiable as often as wanted.

    Args:
        hidden: [b, s, d], floating point.
        kept: [b, k], int64, places of tokens in [0, s), no place twice in a row.

    Returns:
        [b, k, d].

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    apply: Any = _Gather.apply
    found: torch.Tensor = apply(hidden, kept)
    return found


def scatter_tokens(hidden: torch.Tensor, kept: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``hidden`` with its kept tokens replaced; differentiable as often as wanted.

    Args:
        hidden: [b, s, d], floating point; left as it is.
        kept: [b, k], as for :func:`gather_tokens`.
        values: [b, k, d], of the dtype of ``hidden``.

    Returns:
        [b, s, d].

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    apply: Any = _Scatter.apply
    found: torch.Tensor = apply(hidden, kept, values)
    return found


class _Gather(torch.autograd.Function):
    """Its gradient puts rows back where they came from, among zeros."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, kept: torch.Tensor) -> Any:
        ctx.save_for_backward(kept)
        ctx.shape = hidden.shape
        return GATHER_TOKENS.call(hidden, kept)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        return scatter_tokens(gradient.new_zeros(ctx.shape), kept, gradient), None


class _Scatter(torch.autograd.Function):
    """Its gradient goes to the new rows where they are, and to the old ones elsewhere."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, kept: torch.Tensor, values: torch.Tensor) -> Any:
        ctx.save_for_backward(kept)
        return SCATTER_TOKENS.call(hidden, kept, values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        new = gather_tokens(gradient, kept)
        old = None
        if ctx.needs_input_grad[0]:
            old = scatter_tokens(gradient, kept, torch.zeros_like(new))
        return old, None, new


# -- the operators --------------------------------------------------------------------------------


def _places(hidden: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return kept.unsqueeze(-1).expand(-1, -1, hidden.shape[2])


def _gather_reference(hidden: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return torch.gather(hidden, 1, _places(hidden, kept))


def _scatter_reference(
    hidden: torch.Tensor, kept: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    return hidden.scatter(1, _places(hidden, kept), values)


def _check(op: str, hidden: torch.Tensor, kept: torch.Tensor) -> None:
    def fail(argument: str, problem: str, expected: str) -> ArgumentError:
        return ArgumentError(f"drivetrain::{op}: {argument} {problem}; expected {expected}")

    if hidden.dim() != 3 or not hidden.is_floating_point():
        raise fail("hidden", f"is {hidden.dtype} {tuple(hidden.shape)}", "[b, s, d], floating")
    if kept.dtype != torch.int64 or kept.dim() != 2 or kept.shape[0] != hidden.shape[0]:
        raise fail("kept", f"is {kept.dtype} {tuple(kept.shape)}", f"int64 [{hidden.shape[0]}, k]")
    if kept.shape[1] > hidden.shape[1]:
        raise fail("kept", f"has {kept.shape[1]} places", f"at most {hidden.shape[1]}, the tokens")
    if kept.device != hidden.device:
        raise fail("kept", f"is on {kept.device}", f"{hidden.device}")


def _gather_check(hidden: torch.Tensor, kept: torch.Tensor) -> None:
    _check("gather_tokens", hidden, kept)


def _scatter_check(hidden: torch.Tensor, kept: torch.Tensor, values: torch.Tensor) -> None:
    _check("scatter_tokens", hidden, kept)
    want = (*kept.shape, hidden.shape[2])
    if values.shape != want or values.dtype != hidden.dtype or values.device != hidden.device:
        raise ArgumentError(
            f"drivetrain::scatter_tokens: values is {values.dtype} {tuple(values.shape)} on "
            f"{values.device}; expected {hidden.dtype} {want} on {hidden.device}"
        )


def _gather_fake(hidden: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty((*kept.shape, hidden.shape[2]))


def _scatter_fake(hidden: torch.Tensor, kept: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _cases(device: torch.device) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for b, s, k, d in ((1, 1, 1, 1), (2, 7, 3, 5), (3, 64, 64, 33), (2, 130, 17, 257)):
            hidden = torch.randn((b, s, d), generator=generator).to(device, dtype)
            order = torch.rand((b, s), generator=generator).argsort(1)[:, :k]
            kept = order.sort(1).values.to(device)
            name = f"{dtype}-{b}x{s}x{d}-{k}".removeprefix("torch.")
            yield name, hidden, kept
            yield f"{name}-strided", hidden.transpose(1, 2).contiguous().transpose(1, 2), kept
    yield "none kept", torch.ones(2, 3, 4, device=device), kept.new_empty((2, 0))


def _gather_examples(device: torch.device) -> Iterator[Example]:
    return (Example(name, (hidden, kept)) for name, hidden, kept in _cases(device))


def _scatter_examples(device: torch.device) -> Iterator[Example]:
    for name, hidden, kept in _cases(device):
        values = -_gather_reference(hidden, kept) - 1
        yield Example(name, (hidden, kept, values))


def _gather_refusals(device: torch.device) -> Iterator[Refusal]:
    hidden = torch.ones(2, 3, 4, device=device)
    kept = torch.zeros(2, 1, dtype=torch.int64, device=device)
    yield Refusal("a matrix", (hidden[0], kept), "hidden")
    yield Refusal("integers", (hidden.int(), kept), "hidden")
    yield Refusal("32-bit places", (hidden, kept.int()), "kept")
    yield Refusal("another batch", (hidden, kept[:1]), "kept")
    yield Refusal("too many", (hidden, kept.expand(2, 4).contiguous()), "kept")


def _scatter_refusals(device: torch.device) -> Iterator[Refusal]:
    hidden = torch.ones(2, 3, 4, device=device)
    kept = torch.zeros(2, 1, dtype=torch.int64, device=device)
    yield Refusal("32-bit places", (hidden, kept.int(), hidden[:, :1].clone()), "kept")
    yield Refusal("too many values", (hidden, kept, hidden.clone()), "values")
    yield Refusal("another dtype", (hidden, kept, hidden[:, :1].half()), "values")


GATHER_TOKENS = registry.define(
    Op(
        "gather_tokens",
        "(Tensor hidden, Tensor kept) -> Tensor",
        reference=_gather_reference,
        check=_gather_check,
        examples=_gather_examples,
        refusals=_gather_refusals,
        fake=_gather_fake,
        group=_GROUP,
    )
)
SCATTER_TOKENS = registry.define(
    Op(
        "scatter_tokens",
        "(Tensor hidden, Tensor kept, Tensor values) -> Tensor",
        reference=_scatter_reference,
        check=_scatter_check,
        examples=_scatter_examples,
        refusals=_scatter_refusals,
        fake=_scatter_fake,
        group=_GROUP,
    )
)
