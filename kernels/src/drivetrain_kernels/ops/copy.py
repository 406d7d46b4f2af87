"""Copies that cast: one tensor, or many tensors into and out of a flat buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from drivetrain_kernels.checks import Checker
from drivetrain_kernels.op import Example, Op, Refusal
from drivetrain_kernels.ops.update import Scale, split_scale
from drivetrain_kernels.registry import registry
from drivetrain_kernels.rounding import store

_cast = Checker("cast_copy")
_flatten = Checker("flatten")
_unflatten = Checker("unflatten")


def cast_copy(
    target: torch.Tensor, source: torch.Tensor, *, scale: Scale = 1.0, seed: int | None = None
) -> None:
    """``target = source * scale``, computed in float32 and rounded once.

    Args:
        target: any shape; float32, bfloat16 or float16.
        source: same shape; float32, bfloat16 or float16.
        scale: number or 0-d tensor.
        seed: round to bfloat16 stochastically (stream 0, elements in row-major order).

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    scale_tensor, number = split_scale(scale)
    CAST_COPY.call(target, source, scale_tensor, number, seed)


def flatten(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Copy ``tensors`` one after the other into ``flat``, casting to its dtype.

    Args:
        flat: [sum of the tensors' sizes]; float32, bfloat16 or float16.
        tensors: any shapes; float32, bfloat16 or float16.

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    FLATTEN.call(flat, list(tensors))


def unflatten(tensors: Sequence[torch.Tensor], flat: torch.Tensor) -> None:
    """The way back of :func:`flatten`: fill ``tensors`` from ``flat``, casting to their dtypes.

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    UNFLATTEN.call(list(tensors), flat)


def _cast_reference(
    target: torch.Tensor,
    source: torch.Tensor,
    scale_tensor: torch.Tensor | None,
    scale: float,
    seed: int | None,
) -> None:
    compute = torch.promote_types(source.dtype, torch.float32)
    values = source.to(compute)
    if scale_tensor is not None or scale != 1.0:
        factor = torch.tensor(scale, dtype=compute, device=source.device)
        if scale_tensor is not None:
            factor = factor * scale_tensor.reshape(()).to(compute)
        values = values * factor
    if seed is None:
        target.copy_(values)
        return
    rounded = target.new_empty(target.numel())
    store(rounded, values.reshape(-1), seed, 0)
    target.copy_(rounded.view(target.shape))


def _flatten_reference(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    sizes = [tensor.numel() for tensor in tensors]
    for part, tensor in zip(torch.split(flat, sizes), tensors, strict=True):
        part.copy_(tensor.reshape(-1))


def _unflatten_reference(tensors: list[torch.Tensor], flat: torch.Tensor) -> None:
    sizes = [tensor.numel() for tensor in tensors]
    for part, tensor in zip(torch.split(flat, sizes), tensors, strict=True):
        tensor.copy_(part.view(tensor.shape))


def _cast_check(
    target: torch.Tensor,
    source: torch.Tensor,
    scale_tensor: torch.Tensor | None,
    scale: float,
    seed: int | None,
) -> None:
    _cast.floating(target, "target")
    _cast.floating(source, "source")
    if source.shape != target.shape:
        raise _cast.fail("source", f"has shape {tuple(source.shape)}", f"{tuple(target.shape)}")
    _cast.same_device(source, "source", target.device)
    _cast.scale(scale_tensor, target.device)
    _cast.seed(seed, [target])


def _check_flat(checker: Checker, flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    checker.floating(flat, "flat")
    checker.flat(flat, "flat")
    for index, tensor in enumerate(tensors):
        checker.floating(tensor, f"tensors[{index}]")
        checker.same_device(tensor, f"tensors[{index}]", flat.device)
    total = sum(tensor.numel() for tensor in tensors)
    checker.numel(flat, "flat", total, "the sum of the tensors'")


def _flatten_check(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    _check_flat(_flatten, flat, tensors)


def _unflatten_check(tensors: list[torch.Tensor], flat: torch.Tensor) -> None:
    _check_flat(_unflatten, flat, tensors)


# -- examples -------------------------------------------------------------------------------------

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _normal(generator: torch.Generator, device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(device)


def _cast_examples(device: torch.device) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)
    for source in _DTYPES:
        for target in _DTYPES:
            seed = 77 if target == torch.bfloat16 else None
            name = f"{source}-{target}".replace("torch.", "")
            for size in (0, 1, 63, 4099):
                values = _normal(generator, device, size).to(source)
                empty = torch.empty(size, dtype=target, device=device)
                yield Example(f"{name}-{size}", (empty, values, None, 1.0, None))
                yield Example(f"{name}-{size}-scaled", (empty.clone(), values, None, 0.3, seed))
            values = _normal(generator, device, 131).to(source)[1:].view(10, 13)
            half = torch.tensor(0.5, device=device)
            unaligned = torch.empty(131, dtype=target, device=device)[1:].view(10, 13)
            yield Example(f"{name}-unaligned", (unaligned, values, half, 3.0, None))
            strided = torch.empty(13, 10, dtype=target, device=device).t()
            yield Example(f"{name}-strided", (strided, values, None, 1.0, seed))
    extremes = torch.tensor([0.0, -0.0, 1e-40, 65519.0, 65520.0, 1e38, 6e-8, 2e-8], device=device)
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.3895e38], device=device)
    for target in _DTYPES:
        values = torch.cat([extremes, -extremes, special])
        empty = torch.empty_like(values, dtype=target)
        yield Example(f"extremes-{target}", (empty, values, None, 1.0, None))


def _cast_refusals(device: torch.device) -> Iterator[Refusal]:
    ones = torch.ones(4, device=device)
    square = torch.ones(2, 2, device=device)
    yield Refusal("other shape", (ones, square, None, 1.0, None), "source")
    yield Refusal("integers", (ones, ones.int(), None, 1.0, None), "source")
    yield Refusal("onto itself", (ones, ones, None, 1.0, None), "target")


def _lists(device: torch.device) -> Iterator[tuple[str, torch.Tensor, list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    for dtype in _DTYPES:
        for flat_dtype in _DTYPES:
            tensors = [
                _normal(generator, device, 3, 5).to(dtype),
                _normal(generator, device, 0).to(dtype),
                _normal(generator, device, 1).to(dtype),
                _normal(generator, device, 1001).to(dtype)[1:],
                _normal(generator, device, 6, 7).to(dtype).t(),
            ]
            flat = _normal(generator, device, 1 + sum(t.numel() for t in tensors)).to(flat_dtype)
            yield f"{dtype}-{flat_dtype}".replace("torch.", ""), flat[1:], tensors
    yield "nothing", torch.empty(0, device=device), []


def _flatten_examples(device: torch.device) -> Iterator[Example]:
    return (Example(label, (flat, tensors)) for label, flat, tensors in _lists(device))


def _unflatten_examples(device: torch.device) -> Iterator[Example]:
    return (Example(label, (tensors, flat)) for label, flat, tensors in _lists(device))


def _flatten_refusals(device: torch.device) -> Iterator[Refusal]:
    ones = torch.ones(4, device=device)
    yield Refusal("too short", (torch.empty(3, device=device), [ones]), "flat")
    yield Refusal("a view of the buffer", (ones, [ones[:4]]), "flat")


def _unflatten_refusals(device: torch.device) -> Iterator[Refusal]:
    ones = torch.ones(4, device=device)
    yield Refusal("too long", ([ones], torch.empty(5, device=device)), "flat")
    yield Refusal("integers", ([ones.int()], ones), "tensors[0]")


CAST_COPY = registry.define(
    Op(
        "cast_copy",
        "(Tensor(a!) target, Tensor source, Tensor? scale_tensor, float scale, int? seed) -> ()",
        reference=_cast_reference,
        check=_cast_check,
        examples=_cast_examples,
        refusals=_cast_refusals,
    )
)
FLATTEN = registry.define(
    Op(
        "flatten",
        "(Tensor(a!) flat, Tensor[] tensors) -> ()",
        reference=_flatten_reference,
        check=_flatten_check,
        examples=_flatten_examples,
        refusals=_flatten_refusals,
    )
)
UNFLATTEN = registry.define(
    Op(
        "unflatten",
        "(Tensor(a!)[] tensors, Tensor flat) -> ()",
        reference=_unflatten_reference,
        check=_unflatten_check,
        examples=_unflatten_examples,
        refusals=_unflatten_refusals,
    )
)
