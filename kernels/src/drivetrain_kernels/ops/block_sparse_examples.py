"""Calls of block-sparse attention that every implementation must get right, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from drivetrain_kernels.op import Example, Refusal
from drivetrain_kernels.ops.block_lists import block_lists

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Shape:
    label: str
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 96
    keys: int = 96
    dim: int = 32
    value_dim: int = 32
    block: int = 32
    causal: bool = False
    per_head: bool = False
    per_sample: bool = False
    segments: bool = False
    mask: bool = False
    bias: bool = False


_SHAPES = (
    _Shape("plain"),
    _Shape("causal short end", causal=True, queries=70, keys=70, dim=64, value_dim=64),
    _Shape("shared keys", heads=6, queries=48, keys=48, block=16, causal=True, per_head=True),
    _Shape("packed", batch=2, segments=True, causal=True, queries=61, keys=61),
    _Shape("masked", batch=2, queries=50, keys=50, mask=True, per_sample=True),
    _Shape("biased", batch=2, bias=True, per_head=True, block=16, queries=40, keys=40),
    _Shape("other keys", heads=1, kv_heads=1, queries=33, keys=130, dim=20, value_dim=12, block=64),
    _Shape("large blocks", kv_heads=1, queries=150, keys=150, block=128, dim=80),
    _Shape("small blocks", block=4, queries=21, keys=21, dim=8, value_dim=40, causal=True),
)


def _call(shape: _Shape, dtype: torch.dtype, device: torch.device) -> list[Any]:
    generator = torch.Generator().manual_seed(7)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    b, block = shape.batch, shape.block
    # As models have them: heads inside of tokens.
    query = normal(b, shape.queries, shape.heads, shape.dim)
    key, value = (
        normal(b, shape.keys, shape.kv_heads, width) for width in (shape.dim, shape.value_dim)
    )
    rows, columns = -(-shape.queries // block), -(-shape.keys // block)
    listed = (b if shape.per_sample else 1, shape.heads if shape.per_head else 1)
    seen = torch.rand(*listed, rows, columns, generator=generator) < 0.5
    seen |= torch.eye(rows, columns, dtype=torch.bool)
    seen[:, :, -1] = True
    if shape.causal:
        seen &= torch.ones(rows, columns, dtype=torch.bool).tril()
    lists = block_lists(seen)
    segments = mask = bias = None
    if shape.segments:
        segments = torch.randint(0, 9, (b, shape.queries), generator=generator).sort(1)[0].int()
    blocks = (1 if shape.per_sample else b, len(lists[1]), block, block)
    if shape.mask:
        mask = torch.rand(blocks, generator=generator) < 0.7
    if shape.bias:
        bias = normal(*blocks)
    keys_of = segments.clone() if segments is not None else None
    if keys_of is not None:
        keys_of[:, 5:9] = -1
    visible = [segments, keys_of, mask, bias, block, shape.causal, shape.dim**-0.5]
    tensors = [x.to(device, dtype).transpose(1, 2) for x in (query, key, value)]
    return [*tensors, [x.to(device) for x in lists], _moved(visible, device)]


def _moved(values: list[Any], device: torch.device) -> list[Any]:
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in values]


def _forward(shape: _Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    query, key, value, lists, visible = _call(shape, dtype, device)
    return (query, key, value, *lists[:2], *visible)


def _backward(shape: _Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    from drivetrain_kernels.ops.block_sparse_attention import BLOCK_SPARSE_ATTENTION

    query, key, value, lists, visible = _call(shape, dtype, device)
    wide = [x.double() for x in (query, key, value)]
    out, lse = BLOCK_SPARSE_ATTENTION.reference(*wide, *lists[:2], *visible)
    generator = torch.Generator().manual_seed(8)
    gradient = torch.randn(out.shape, generator=generator).to(device, dtype)
    delta = (gradient.double() * out).sum(3).float().contiguous()
    tensors = (gradient, query, key, value, lse.float(), delta)
    return (*tensors, *lists, *visible, shape.bias)


def _choice() -> Iterator[tuple[torch.dtype, _Shape]]:
    """All shapes in float32, and some in each of the others: an interpreter is slow."""
    for number, dtype in enumerate(_DTYPES):
        for shape in _SHAPES if number == 0 else _SHAPES[number::3]:
            yield dtype, shape


def forward_examples(device: torch.device) -> Iterator[Example]:
    """Of ``block_sparse_attention``."""
    for dtype, shape in _choice():
        label = f"{str(dtype).removeprefix('torch.')}-{shape.label}"
        yield Example(label, _forward(shape, dtype, device))


def backward_examples(device: torch.device) -> Iterator[Example]:
    """Of ``block_sparse_attention_backward``."""
    for dtype, shape in _choice():
        label = f"{str(dtype).removeprefix('torch.')}-{shape.label}"
        yield Example(label, _backward(shape, dtype, device))


def forward_refusals(device: torch.device) -> Iterator[Refusal]:
    """Of ``block_sparse_attention``."""
    good = _forward(_SHAPES[0], torch.float32, device)
    packed = _forward(_SHAPES[3], torch.float32, device)
    masked = _forward(_SHAPES[4], torch.float32, device)
    yield from _changed(
        (good, "another dtype", 1, good[1].half(), "key"),
        (good, "heads that do not divide", 1, good[1][:, :0], "key"),
        (good, "other keys", 2, good[2][:, :, :-1], "value"),
        (good, "long starts", 3, good[3].long(), "starts"),
        (good, "another length", 3, good[3][..., :-1], "starts"),
        (good, "columns of a table", 4, good[4][None], "columns"),
        (good, "no block", 9, 0, "block"),
        (packed, "segments of queries alone", 6, None, "key_segments"),
        (packed, "short segments", 5, packed[5][:, 1:], "query_segments"),
        (masked, "a mask of other blocks", 7, masked[7][:, 1:], "mask"),
        (masked, "a mask of numbers", 7, masked[7].float(), "mask"),
    )


def backward_refusals(device: torch.device) -> Iterator[Refusal]:
    """Of ``block_sparse_attention_backward``."""
    good = _backward(_SHAPES[0], torch.float32, device)
    yield from _changed(
        (good, "a gradient of another shape", 0, good[0][:, :, 1:], "gradient"),
        (good, "a short delta", 5, good[5][:, :, 1:], "delta"),
        (good, "short rows", 9, good[9][1:], "back_rows"),
        (good, "a gradient of no bias", 18, True, "bias_gradient"),
    )


def _changed(
    *changes: tuple[tuple[Any, ...], str, int, Any, str],
) -> Iterator[Refusal]:
    for good, label, position, value, name in changes:
        call = list(good)
        call[position] = value
        yield Refusal(label, tuple(call), name)
