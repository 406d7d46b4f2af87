"""Attention over keys and values that lie in blocks of a cache, for tokens of many sequences."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from drivetrain_kernels.checks import LOW_PRECISION, Checker
from drivetrain_kernels.op import Example, Op, Refusal, Tolerance
from drivetrain_kernels.ops.cache_codes import (
    LARGEST,
    check_caches,
    from_cache_codes,
    to_cache_codes,
)
from drivetrain_kernels.registry import registry

_checker = Checker("paged_attention")


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the newest tokens of each sequence (vLLM, arXiv 2309.06180).

    Sequence s has ``lengths[s]`` tokens in the cache, of which the last ``starts[s + 1] -
    starts[s]`` are this call's queries. Its token t lies in block ``tables[s, t // size]`` at place
    ``t % size``. Query head h reads head ``h // (heads / kv_heads)``. Sums are made in float32.

    Args:
        query: [tokens, heads, dim]; strides of the last two dimensions are contiguous.
        keys: [blocks, kv_heads, size, dim], dtype of ``query``, or codes as
            :func:`~drivetrain_kernels.rotary_to_cache` writes them.
        values: [blocks, kv_heads, size, value_dim], dtype of ``keys``.
        tables: [sequences, most blocks], int32.
        starts: [sequences + 1], int32, from 0 to the number of tokens.
        lengths: [sequences], int32.
        scale: factor of the scores.
        window: keys that a query sees at most, itself among them; 0 for all.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        sinks: [heads], float32: a further score of each head, without a value (gpt-oss).
        key_scales: [blocks, kv_heads, size], float32, where the cache holds codes.
        value_scales: like ``key_scales``.

    Returns:
        [tokens, heads, value_dim], dtype of ``query``.

    Raises:
        ArgumentError: names the argument and what was expected. Contents of ``tables``, ``starts``
            and ``lengths`` are the caller's to keep right.
    """
    call = (query, keys, values, tables, starts, lengths, scale, window, softcap, sinks)
    result: torch.Tensor = PAGED_ATTENTION.call(*call, key_scales, value_scales)
    return result


def _reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor,
    starts: torch.Tensor, lengths: torch.Tensor, scale: float, window: int, softcap: float,
    sinks: torch.Tensor | None, key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    compute = torch.promote_types(query.dtype, torch.float32)
    size, group = keys.shape[2], query.shape[1] // keys.shape[1]
    output = query.new_empty(*query.shape[:2], values.shape[3])
    bounds = starts.tolist()
    for s, length in enumerate(lengths.tolist()):
        first, last = bounds[s], bounds[s + 1]
        if first == last:
            continue
        blocks = tables[s, : -(-length // size)].long()
        key, value = (
            _plain(cache, scales, blocks).transpose(0, 1).flatten(1, 2)[:, :length].to(compute)
            for cache, scales in ((keys, key_scales), (values, value_scales))
        )
        key, value = (part.repeat_interleave(group, 0) for part in (key, value))
        scores = query[first:last].transpose(0, 1).to(compute) @ key.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(length - (last - first), length, device=query.device)[:, None]
        seen = torch.arange(length, device=query.device)[None]
        hidden = (seen > at) | (seen <= at - window if window else torch.zeros_like(seen > at))
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            column = sinks.to(compute)[:, None, None].expand(-1, last - first, 1)
            scores = torch.cat([scores, column], dim=2)
        weights = torch.softmax(scores, dim=2)[..., :length]
        output[first:last] = (weights @ value).transpose(0, 1).to(output.dtype)
    return output


def _plain(cache: torch.Tensor, scales: torch.Tensor | None, blocks: torch.Tensor) -> torch.Tensor:
    """The numbers of some blocks."""
    return cache[blocks] if scales is None else from_cache_codes(cache[blocks], scales[blocks])


def _check(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor,
    starts: torch.Tensor, lengths: torch.Tensor, scale: float, window: int, softcap: float,
    sinks: torch.Tensor | None, key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:  # fmt: skip
    _checker.floating(query, "query")
    # Of what has one element alone, such as the heads of a rank that has one, strides say nothing.
    if query.dim() != 3 or not query[:1].is_contiguous():
        raise _checker.fail("query", f"is {list(query.shape)}", "[tokens, heads, dim], dense heads")
    caches = {"keys": keys, "values": values}
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    for name, cache in caches.items():
        _checker.same_device(cache, name, query.device)
        if cache.dim() != 4 or cache.shape[:3] != keys.shape[:3] or not cache.is_contiguous():
            expected = "contiguous [blocks, kv_heads, size, dim]"
            raise _checker.fail(name, f"is {list(cache.shape)}", expected)
    check_caches(_checker, query.dtype, caches, scales)
    if keys.shape[3] != query.shape[2] or query.shape[1] % keys.shape[1]:
        expected = f"{query.shape[2]} per head, and heads that divide {query.shape[1]}"
        raise _checker.fail("keys", f"is {list(keys.shape)}", expected)
    for name, numbers, dims in (
        ("tables", tables, 2),
        ("starts", starts, 1),
        ("lengths", lengths, 1),
    ):
        _checker.dtype(numbers, name, torch.int32)
        if numbers.dim() != dims or not numbers.is_contiguous():
            raise _checker.fail(name, f"is {list(numbers.shape)}", f"{dims} contiguous dimensions")
    _checker.numel(starts, "starts", len(lengths) + 1, "one more than lengths")
    if len(tables) != len(lengths):
        raise _checker.fail("tables", f"has {len(tables)} rows", f"{len(lengths)}, as lengths")
    _checker.number(window, "window", low=0)
    _checker.number(softcap, "softcap", low=0)
    if sinks is not None:
        _checker.floating(sinks, "sinks", (torch.float32,))
        _checker.numel(sinks, "sinks", query.shape[1], "one a head")


def _fake(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *rest: object
) -> torch.Tensor:
    return query.new_empty(*query.shape[:2], values.shape[3])


_Shape = tuple[str, list[tuple[int, int]], int, int, int, int, int]
# (label, (cached, new) tokens per sequence, heads, kv_heads, block size, dim, value_dim)
_SHAPES: tuple[_Shape, ...] = (
    ("decode", [(0, 1), (15, 1), (16, 1), (70, 1)], 9, 3, 16, 64, 64),
    ("prompts", [(0, 33), (5, 40), (64, 17)], 4, 4, 16, 32, 32),
    ("mixed", [(7, 1), (0, 20), (3, 0), (130, 1)], 6, 1, 32, 80, 80),
    ("odd", [(2, 3), (8, 1)], 2, 1, 8, 20, 12),
    ("one head", [(2, 3), (8, 1)], 1, 1, 8, 16, 16),
)


def _example(
    shape: _Shape, dtype: torch.dtype, device: torch.device, window: int, softcap: float, sink: bool
) -> tuple[object, ...]:
    _, sequences, heads, kv_heads, size, dim, value_dim = shape
    generator = torch.Generator().manual_seed(7)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    counts = [-(-(cached + new) // size) for cached, new in sequences]
    order = torch.randperm(sum(counts) + 2, generator=generator).to(torch.int32)
    tables, used = torch.zeros(len(sequences), max(counts), dtype=torch.int32), 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[used : used + count]
        used += count
    new = torch.tensor([0] + [each for _, each in sequences]).cumsum(0).to(torch.int32)
    lengths = torch.tensor([sum(each) for each in sequences], dtype=torch.int32)
    query = normal(int(new[-1]), heads + 2, dim)[:, :heads]
    if heads == 1:
        query = normal(1, int(new[-1]), dim).transpose(0, 1)
    keys, values = (normal(len(order), kv_heads, size, each) for each in (dim, value_dim))
    sinks = normal(heads).float() if sink else None
    metadata = (tables.to(device), new.to(device), lengths.to(device))
    return query, keys, values, *metadata, dim**-0.5, window, softcap, sinks, None, None


def _coded(call: tuple[object, ...], kind: torch.dtype) -> tuple[object, ...]:
    """The same call with a cache of codes."""
    query, keys, values, *rest = call
    pairs = [to_cache_codes(each, kind) for each in (keys, values)]  # type: ignore[arg-type]
    (keys, key_scales), (values, value_scales) = pairs
    return (query, keys, values, *rest[:-2], key_scales, value_scales)


def _examples(device: torch.device) -> Iterator[Example]:
    for dtype in (torch.float32, *LOW_PRECISION):
        name = str(dtype).removeprefix("torch.")
        for shape in _SHAPES:
            call = _example(shape, dtype, device, 0, 0.0, False)
            yield Example(f"{name}-{shape[0]}", call)
            for kind in LARGEST:
                yield Example(f"{name}-{shape[0]} {kind}", _coded(call, kind))
        for label, options in (
            ("window", (5, 0.0, False)),
            ("softcap", (0, 3.0, False)),
            ("sinks", (21, 0.0, True)),
        ):
            for shape in _SHAPES[1:3]:
                call = _example(shape, dtype, device, *options)
                yield Example(f"{name}-{shape[0]} {label}", call)


def _refusals(device: torch.device) -> Iterator[Refusal]:
    good = _example(_SHAPES[0], torch.float32, device, 0, 0.0, False)
    for label, position, value, name in (
        ("another dtype", 1, good[1].half(), "keys"),  # type: ignore[attr-defined]
        ("other heads", 1, good[1][:, :2].contiguous(), "keys"),  # type: ignore[index]
        ("long tables", 3, good[3].long(), "tables"),  # type: ignore[attr-defined]
        ("short starts", 4, good[4][:-1], "starts"),  # type: ignore[index]
        ("negative window", 7, -1, "window"),
        ("needless scales", 10, torch.ones(2, device=device), "key_scales"),
        ("codes without scales", 1, good[1].char(), "keys"),  # type: ignore[attr-defined]
    ):
        call = list(good)
        call[position] = value
        if label == "other heads":
            call[2] = good[2][:, :2].contiguous()  # type: ignore[index]
        yield Refusal(label, tuple(call), name)


PAGED_ATTENTION = registry.define(
    Op(
        "paged_attention",
        "(Tensor query, Tensor keys, Tensor values, Tensor tables, Tensor starts, Tensor lengths, "
        "float scale, int window, float softcap, Tensor? sinks, Tensor? key_scales, "
        "Tensor? value_scales) -> Tensor",
        reference=_reference,
        check=_check,
        examples=_examples,
        refusals=_refusals,
        fake=_fake,
        tolerance=Tolerance(
            {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2},
            {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3},
        ),
        group="serving",
    )
)
