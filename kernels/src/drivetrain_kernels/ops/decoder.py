"""The small operations between the matrices of a decoder: norm, rotation, gated activation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from drivetrain_kernels.checks import LOW_PRECISION, Checker
from drivetrain_kernels.op import Example, Op, Refusal, Tolerance
from drivetrain_kernels.ops.cache_codes import LARGEST, check_caches, to_cache_codes
from drivetrain_kernels.registry import registry

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
"""What :func:`gated_activation` knows."""

_norm = Checker("add_rms_norm")
_rotary = Checker("rotary_to_cache")
_gated = Checker("gated_activation")
_DTYPES = (torch.float32, *LOW_PRECISION)


def add_rms_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """``residual += delta``, then its RMS norm (arXiv 1910.07467), computed in float32.

    Args:
        residual: [rows, dim], contiguous; written if there is a ``delta``.
        delta: like ``residual``, or ``None``.
        weight: [dim], dtype of ``residual``.
        eps: added to the mean of squares.

    Returns:
        [rows, dim], dtype of ``residual``.
    """
    result: torch.Tensor = ADD_RMS_NORM.call(residual, delta, weight, eps)
    return result


def rotary_to_cache(
    joined: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Rotate queries and keys by their positions (RoFormer, arXiv 2104.09864); fill the cache.

    The first ``rotated`` elements of a head are rotated by halves: element i with i + rotated / 2.
    Keys and values go to their places in the cache, queries are rotated where they lie.

    Args:
        joined: [tokens, (heads + 2 * kv_heads) * dim]: queries, keys, values; contiguous, written.
        cosine: [tokens, rotated / 2], float32.
        sine: like ``cosine``.
        keys: [blocks, kv_heads, size, dim], dtype of ``joined``, or codes: int8 for integers,
            uint8 for numbers of E4M3; written.
        values: like ``keys``; written.
        slots: [tokens], int32: ``block * size + place`` of each token.
        key_scales: [blocks, kv_heads, size], float32, where the cache holds codes: the largest
            element of a head becomes the largest code; written.
        value_scales: like ``key_scales``.
    """
    call = (joined, cosine, sine, keys, values, slots, key_scales, value_scales)
    ROTARY_TO_CACHE.call(*call)


def gated_activation(joined: torch.Tensor, kind: str) -> torch.Tensor:
    """``act(gate) * up`` (GLU variants, arXiv 2002.05202), computed in float32.

    Args:
        joined: [rows, 2 * width], gate before up; contiguous.
        kind: one of :data:`ACTIVATIONS`.

    Returns:
        [rows, width], dtype of ``joined``.
    """
    result: torch.Tensor = GATED_ACTIVATION.call(joined, kind)
    return result


def _norm_reference(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    compute = torch.promote_types(residual.dtype, torch.float32)
    if delta is not None:
        residual.add_(delta)
    wide = residual.to(compute)
    scaled = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    return (scaled * weight.to(compute)).to(residual.dtype)


def _norm_check(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> None:
    _rows(_norm, residual, "residual")
    _norm.dtype(weight, "weight", residual.dtype)
    _norm.numel(weight, "weight", residual.shape[1], "columns of residual")
    _norm.number(eps, "eps", low=0)
    if delta is not None:
        _norm.dtype(delta, "delta", residual.dtype)
        if delta.shape != residual.shape or not delta.is_contiguous():
            expected = f"contiguous {list(residual.shape)}"
            raise _norm.fail("delta", f"is {list(delta.shape)}", expected)


def _rotary_reference(
    joined: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, keys: torch.Tensor,
    values: torch.Tensor, slots: torch.Tensor, key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:  # fmt: skip
    (_, kv_heads, size, dim), half = keys.shape, cosine.shape[1]
    heads = joined.view(len(joined), -1, dim)
    turned = heads[:, : heads.shape[1] - kv_heads, : 2 * half]
    compute = torch.promote_types(joined.dtype, torch.float32)
    first, second = turned.to(compute).chunk(2, dim=2)
    cos, sin = (part[:, None].to(compute) for part in (cosine, sine))
    turned.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=2))
    block, place = (slots // size).long(), (slots % size).long()
    for cache, scales, own in (
        (keys, key_scales, heads[:, -2 * kv_heads : -kv_heads]),
        (values, value_scales, heads[:, -kv_heads:]),
    ):
        if scales is None:
            cache[block, :, place] = own
        else:
            cache[block, :, place], scales[block, :, place] = to_cache_codes(own, cache.dtype)


def _rotary_check(
    joined: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, keys: torch.Tensor,
    values: torch.Tensor, slots: torch.Tensor, key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:  # fmt: skip
    _rows(_rotary, joined, "joined")
    for name, cache in (("keys", keys), ("values", values)):
        if cache.dim() != 4 or cache.shape != keys.shape or not cache.is_contiguous():
            expected = "contiguous [blocks, kv_heads, size, dim]"
            raise _rotary.fail(name, f"is {list(cache.shape)}", expected)
    caches = {"keys": keys, "values": values}
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    check_caches(_rotary, joined.dtype, caches, scales)
    heads, rest = joined.shape[1] // keys.shape[3], joined.shape[1] % keys.shape[3]
    if rest or heads <= 2 * keys.shape[1]:
        raise _rotary.fail("joined", f"is {list(joined.shape)}", "queries, keys and values")
    for name, part in (("cosine", cosine), ("sine", sine)):
        _rotary.floating(part, name, (torch.float32,))
        fits = part.shape == cosine.shape and part.dim() == 2 and part.is_contiguous()
        if not fits or len(part) != len(joined) or 2 * part.shape[1] > keys.shape[3]:
            raise _rotary.fail(name, f"is {list(part.shape)}", "contiguous [tokens, rotated / 2]")
    _rotary.dtype(slots, "slots", torch.int32)
    _rotary.numel(slots, "slots", len(joined), "one a token")


def _gated_reference(joined: torch.Tensor, kind: str) -> torch.Tensor:
    gate, up = joined.to(torch.promote_types(joined.dtype, torch.float32)).chunk(2, dim=1)
    if kind.startswith("gelu"):
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        active = torch.nn.functional.gelu(gate, approximate=approximate)
    else:
        active = getattr(torch.nn.functional, kind)(gate)
    return (active * up).to(joined.dtype)


def _gated_check(joined: torch.Tensor, kind: str) -> None:
    _rows(_gated, joined, "joined")
    if joined.shape[1] % 2:
        raise _gated.fail("joined", f"has {joined.shape[1]} columns", "an even number")
    if kind not in ACTIVATIONS:
        raise _gated.fail("kind", f"is {kind!r}", f"one of {', '.join(ACTIVATIONS)}")


def _rows(checker: Checker, tensor: torch.Tensor, name: str) -> None:
    checker.floating(tensor, name)
    if tensor.dim() != 2 or not tensor.is_contiguous():
        raise checker.fail(name, f"is {list(tensor.shape)}", "contiguous rows")


def _normal(device: torch.device, dtype: torch.dtype, seed: int, *sizes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sizes, generator=generator).to(device, dtype)


def _norm_examples(device: torch.device) -> Iterator[Example]:
    for dtype in _DTYPES:
        for rows, dim in ((1, 576), (5, 33), (0, 8), (3, 7)):
            residual, delta = (_normal(device, dtype, seed, rows, dim) for seed in (0, 1))
            weight = _normal(device, dtype, 2, dim)
            label = f"{str(dtype).removeprefix('torch.')}-{rows}x{dim}"
            yield Example(label, (residual, delta, weight, 1e-5))
            yield Example(f"{label} no delta", (residual, None, weight, 1e-6))


def _rotary_examples(device: torch.device) -> Iterator[Example]:
    for dtype in _DTYPES:
        for tokens, heads, kv_heads, dim, half in (
            (3, 9, 3, 64, 32),
            (5, 2, 1, 20, 5),
            (1, 1, 1, 8, 0),
        ):
            joined = _normal(device, dtype, 0, tokens, (heads + 2 * kv_heads) * dim)
            angles = _normal(device, torch.float32, 1, tokens, half)
            caches = [_normal(device, dtype, seed, 4, kv_heads, 8, dim) for seed in (2, 3)]
            slots = torch.randperm(32, generator=torch.Generator().manual_seed(4))[:tokens]
            label = f"{str(dtype).removeprefix('torch.')}-{tokens}x{heads}x{dim}"
            call = (joined, angles.cos(), angles.sin(), *caches, slots.to(device, torch.int32))
            yield Example(label, (*call, None, None))
            for kind in LARGEST:
                yield _coded_example(f"{label} {kind}", call, kind)


def _coded_example(label: str, call: tuple[torch.Tensor, ...], kind: torch.dtype) -> Example:
    """The same call with a cache of codes.

    A number in the middle between two codes may become either; with inputs of few bits, which are
    rounded once more on the way, that is true of many.
    """
    joined, cosine, sine, keys, values, slots = call
    coded = [torch.zeros_like(each, dtype=kind) for each in (keys, values)]
    scales = [torch.zeros_like(each[..., 0], dtype=torch.float32) for each in (keys, values)]
    plain, low = Tolerance(), joined.dtype in LOW_PRECISION
    relative = {**plain.relative, torch.float32: 2e-2 if low else 1e-5}
    tolerance = Tolerance(relative, plain.absolute, mismatched=0.5 if low else 0.02)
    arguments = (joined, cosine, sine, coded[0], coded[1], slots, scales[0], scales[1])
    return Example(label, arguments, tolerance)


def _gated_examples(device: torch.device) -> Iterator[Example]:
    for dtype in _DTYPES:
        for kind in ACTIVATIONS:
            for rows, width in ((1, 48), (3, 37), (0, 4)):
                joined = 3 * _normal(device, dtype, 0, rows, 2 * width)
                label = f"{str(dtype).removeprefix('torch.')}-{kind}-{rows}x{width}"
                yield Example(label, (joined, kind))


def _norm_refusals(device: torch.device) -> Iterator[Refusal]:
    ones = torch.ones(2, 8, device=device)
    yield Refusal("short weight", (ones, None, ones[0, :4], 1e-5), "weight")
    yield Refusal("other delta", (ones, ones[:1].clone(), ones[0].clone(), 1e-5), "delta")
    yield Refusal("integers", (ones.int(), None, ones[0].clone(), 1e-5), "residual")


def _rotary_refusals(device: torch.device) -> Iterator[Refusal]:
    joined, angles = torch.ones(2, 24, device=device), torch.ones(2, 4, device=device)
    keys, values = (torch.ones(2, 1, 4, 8, device=device) for _ in range(2))
    slots = torch.zeros(2, dtype=torch.int32, device=device)
    good = (joined, angles, angles.clone(), keys, values, slots, None, None)
    codes = (torch.zeros_like(keys, dtype=torch.int8), torch.zeros_like(keys, dtype=torch.int8))
    ones = torch.ones(2, 1, 4, device=device)
    yield Refusal("half a head", (joined[:, :20].contiguous(), *good[1:]), "joined")
    yield Refusal("one angle", (joined, angles[:1], *good[2:]), "cosine")
    yield Refusal("long slots", (*good[:5], slots.long(), None, None), "slots")
    yield Refusal("other values", (*good[:4], values[:1].clone(), slots, None, None), "values")
    yield Refusal("no scales", (*good[:3], *codes, slots, None, None), "key_scales")
    yield Refusal("one scale", (*good[:3], *codes, slots, ones, ones[:1].clone()), "value_scales")
    yield Refusal("needless scales", (*good[:6], ones, ones.clone()), "key_scales")
    yield Refusal("half of it codes", (*good[:3], codes[0], *good[4:]), "keys")


def _gated_refusals(device: torch.device) -> Iterator[Refusal]:
    yield Refusal("odd", (torch.ones(2, 7, device=device), "silu"), "joined")
    yield Refusal("unknown", (torch.ones(2, 8, device=device), "sine"), "kind")


def _norm_fake(residual: torch.Tensor, *rest: object) -> torch.Tensor:
    return torch.empty_like(residual)


def _gated_fake(joined: torch.Tensor, kind: str) -> torch.Tensor:
    return joined.new_empty(len(joined), joined.shape[1] // 2)


ADD_RMS_NORM = registry.define(
    Op(
        "add_rms_norm",
        "(Tensor(a!) residual, Tensor? delta, Tensor weight, float eps) -> Tensor",
        reference=_norm_reference,
        check=_norm_check,
        examples=_norm_examples,
        refusals=_norm_refusals,
        fake=_norm_fake,
        group="serving",
    )
)
ROTARY_TO_CACHE = registry.define(
    Op(
        "rotary_to_cache",
        "(Tensor(a!) joined, Tensor cosine, Tensor sine, Tensor(b!) keys, Tensor(c!) values, "
        "Tensor slots, Tensor(d!)? key_scales, Tensor(e!)? value_scales) -> ()",
        reference=_rotary_reference,
        check=_rotary_check,
        examples=_rotary_examples,
        refusals=_rotary_refusals,
        group="serving",
    )
)
GATED_ACTIVATION = registry.define(
    Op(
        "gated_activation",
        "(Tensor joined, str kind) -> Tensor",
        reference=_gated_reference,
        check=_gated_check,
        examples=_gated_examples,
        refusals=_gated_refusals,
        fake=_gated_fake,
        # 1 + erf(x) cancels where x is below -2, to half a unit in the last place of 1, which is
        # then multiplied by x and by the other half of the row.
        tolerance=Tolerance(absolute={**Tolerance().absolute, torch.float32: 1e-5}),
        group="serving",
    )
)
