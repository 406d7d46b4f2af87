"""Block-sparse attention in Triton: one program for each block of queries, or of keys.

Sums are made in float32, in the order of the lists. The backward of keys and values walks the lists
of the other direction, so that no two programs write the same memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""The interpreter takes bfloat16 for integers in products."""


@triton.jit
def _product(a, b):
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _tile(memory, tokens, count, stride, width, wide: tl.constexpr):
    """Rows ``tokens`` of [count, width], 0 where there is nothing: [block, wide]."""
    places = tl.arange(0, wide)
    inside = (tokens < count)[:, None] & (places < width)[None, :]
    at = tokens.to(tl.int64)[:, None] * stride + places[None, :]
    return tl.load(memory + at, mask=inside, other=0.0)


@triton.jit
def _keep(memory, values, tokens, count, stride, width, wide: tl.constexpr):
    places = tl.arange(0, wide)
    inside = (tokens < count)[:, None] & (places < width)[None, :]
    at = tokens.to(tl.int64)[:, None] * stride + places[None, :]
    tl.store(memory + at, values.to(memory.dtype.element_ty), mask=inside)


@triton.jit
def _scores(
    query, key, entry, sample, rows, columns, query_segments, key_segments, mask, bias,
    mask_sample, bias_sample, queries, keys, scale, causal: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Scores [queries, keys] of a block; minus infinity where a key is hidden."""
    scores = _product(query, tl.trans(key)) * scale
    seen = (columns < keys)[None, :] & (rows < queries)[:, None]
    inside = tl.arange(0, block)[:, None] * block + tl.arange(0, block)[None, :]
    if bias is not None:
        of_bias = bias + sample * bias_sample + entry.to(tl.int64) * block * block
        scores += tl.load(of_bias + inside)
    if mask is not None:
        of_mask = mask + sample * mask_sample + entry.to(tl.int64) * block * block
        seen = seen & (tl.load(of_mask + inside) != 0)
    if query_segments is not None:
        own = tl.load(query_segments + sample * queries + rows, mask=rows < queries, other=0)
        other = tl.load(key_segments + sample * keys + columns, mask=columns < keys, other=0)
        seen = seen & (own[:, None] == other[None, :])
    if causal:
        seen = seen & (columns[None, :] <= rows[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def forward_kernel(
    query, key, value, starts, columns, query_segments, key_segments, mask, bias, out, lse,
    query_sample, query_head, query_token, key_sample, key_head, key_token,
    value_sample, value_head, value_token, out_sample, out_head, out_token,
    list_sample, list_head, mask_sample, bias_sample, heads, group, queries, keys, dim, value_dim,
    scale, causal: tl.constexpr, block: tl.constexpr, wide: tl.constexpr, value_wide: tl.constexpr,
):  # fmt: skip
    """The result of one block of queries of a head."""
    row = tl.program_id(0)
    line = tl.program_id(1)
    sample = (line // heads).to(tl.int64)
    head = (line % heads).to(tl.int64)
    of_keys = head // group
    rows = row * block + tl.arange(0, block)
    own = _tile(query + sample * query_sample + head * query_head, rows, queries, query_token, dim,
                wide)  # fmt: skip
    first = starts + sample * list_sample + head * list_head + row
    highest = tl.full((block,), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    sums = tl.zeros((block, value_wide), tl.float32)
    for entry in range(tl.load(first), tl.load(first + 1)):
        tokens = tl.load(columns + entry) * block + tl.arange(0, block)
        other = _tile(key + sample * key_sample + of_keys * key_head, tokens, keys, key_token, dim,
                      wide)  # fmt: skip
        scores = _scores(
            own, other, tl.cast(entry, tl.int32), sample, rows, tokens, query_segments,
            key_segments, mask, bias, mask_sample, bias_sample, queries, keys, scale, causal, block,
        )  # fmt: skip
        most = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(most == float("-inf"), 0.0, most)
        weights = tl.exp(scores - base[:, None])
        factor = tl.exp(highest - base)
        total = total * factor + tl.sum(weights, 1)
        values = _tile(value + sample * value_sample + of_keys * value_head, tokens, keys,
                       value_token, value_dim, value_wide)  # fmt: skip
        sums = sums * factor[:, None]
        sums += _product(weights.to(values.dtype), values)
        highest = most
    # A NaN stays one.
    some = total != 0.0
    divisor = tl.where(some, total, 1.0)
    _keep(out + sample * out_sample + head * out_head, sums / divisor[:, None], rows, queries,
          out_token, value_dim, value_wide)  # fmt: skip
    logarithm = tl.where(some, highest + tl.log(divisor), float("-inf"))
    tl.store(lse + line.to(tl.int64) * queries + rows, logarithm, mask=rows < queries)


@triton.jit
def _slopes(
    scores, gradient, values, lse, delta, line, rows, queries,
):  # fmt: skip
    """Weights, and what the loss changes with unscaled scores."""
    at = line * queries + rows
    logarithm = tl.load(lse + at, mask=rows < queries, other=float("inf"))
    # Queries that see nothing have weights of 0.
    logarithm = tl.where(logarithm == float("-inf"), float("inf"), logarithm)
    weights = tl.exp(scores - logarithm[:, None])
    inner = tl.load(delta + at, mask=rows < queries, other=0.0)
    product = _product(gradient, tl.trans(values))
    return weights, weights * (product - inner[:, None])


@triton.jit
def query_gradient_kernel(
    gradient, query, key, value, lse, delta, starts, columns, query_segments, key_segments, mask,
    bias, for_query, for_bias, gradient_sample, gradient_head, gradient_token,
    query_sample, query_head, query_token, key_sample, key_head, key_token,
    value_sample, value_head, value_token, out_sample, out_head, out_token,
    list_sample, list_head, mask_sample, bias_sample, bias_entries, heads, group, queries, keys,
    dim, value_dim, scale, causal: tl.constexpr, block: tl.constexpr, wide: tl.constexpr,
    value_wide: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries, and of its blocks of bias."""
    row = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    sample = line // heads
    head = line % heads
    of_keys = head // group
    rows = row * block + tl.arange(0, block)
    own = _tile(query + sample * query_sample + head * query_head, rows, queries, query_token, dim,
                wide)  # fmt: skip
    given = _tile(gradient + sample * gradient_sample + head * gradient_head, rows, queries,
                  gradient_token, value_dim, value_wide)  # fmt: skip
    first = starts + sample * list_sample + head * list_head + row
    sums = tl.zeros((block, wide), tl.float32)
    for entry in range(tl.load(first), tl.load(first + 1)):
        tokens = tl.load(columns + entry) * block + tl.arange(0, block)
        other = _tile(key + sample * key_sample + of_keys * key_head, tokens, keys, key_token, dim,
                      wide)  # fmt: skip
        values = _tile(value + sample * value_sample + of_keys * value_head, tokens, keys,
                       value_token, value_dim, value_wide)  # fmt: skip
        scores = _scores(
            own, other, tl.cast(entry, tl.int32), sample, rows, tokens, query_segments,
            key_segments, mask, bias, mask_sample, bias_sample, queries, keys, scale, causal, block,
        )  # fmt: skip
        _, slopes = _slopes(scores, given, values, lse, delta, line, rows, queries)
        if for_bias is not None:
            place = sample * bias_entries + entry % bias_entries
            inside = tl.arange(0, block)[:, None] * block + tl.arange(0, block)[None, :]
            tl.store(for_bias + place.to(tl.int64) * block * block + inside, slopes)
        sums += _product(slopes.to(other.dtype), other)
    _keep(for_query + sample * out_sample + head * out_head, sums * scale, rows, queries, out_token,
          dim, wide)  # fmt: skip


@triton.jit
def key_gradient_kernel(
    gradient, query, key, value, lse, delta, back_starts, back_rows, back_entries, query_segments,
    key_segments, mask, bias, for_key, for_value, gradient_sample, gradient_head, gradient_token,
    query_sample, query_head, query_token, key_sample, key_head, key_token,
    value_sample, value_head, value_token, of_key_sample, of_key_head, of_key_token,
    of_value_sample, of_value_head, of_value_token, list_sample, list_head, mask_sample,
    bias_sample, heads, group, queries, keys, dim, value_dim, scale, causal: tl.constexpr,
    block: tl.constexpr, wide: tl.constexpr, value_wide: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values, over all heads that share them."""
    column = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    key_heads = heads // group
    sample = line // key_heads
    of_keys = line % key_heads
    tokens = column * block + tl.arange(0, block)
    other = _tile(key + sample * key_sample + of_keys * key_head, tokens, keys, key_token, dim,
                  wide)  # fmt: skip
    values = _tile(value + sample * value_sample + of_keys * value_head, tokens, keys, value_token,
                   value_dim, value_wide)  # fmt: skip
    of_key = tl.zeros((block, wide), tl.float32)
    of_value = tl.zeros((block, value_wide), tl.float32)
    for member in range(group):
        head = of_keys * group + member
        first = back_starts + sample * list_sample + head * list_head + column
        for place in range(tl.load(first), tl.load(first + 1)):
            entry = tl.load(back_entries + place)
            rows = tl.load(back_rows + place) * block + tl.arange(0, block)
            own = _tile(query + sample * query_sample + head * query_head, rows, queries,
                        query_token, dim, wide)  # fmt: skip
            given = _tile(gradient + sample * gradient_sample + head * gradient_head, rows, queries,
                          gradient_token, value_dim, value_wide)  # fmt: skip
            scores = _scores(
                own, other, entry, sample, rows, tokens, query_segments, key_segments, mask, bias,
                mask_sample, bias_sample, queries, keys, scale, causal, block,
            )  # fmt: skip
            weights, slopes = _slopes(
                scores, given, values, lse, delta, sample * heads + head, rows, queries
            )
            of_value += _product(tl.trans(weights).to(given.dtype), given)
            of_key += _product(tl.trans(slopes).to(own.dtype), own)
    _keep(for_key + sample * of_key_sample + of_keys * of_key_head, of_key * scale, tokens, keys,
          of_key_token, dim, wide)  # fmt: skip
    _keep(for_value + sample * of_value_sample + of_keys * of_value_head, of_value, tokens, keys,
          of_value_token, value_dim, value_wide)  # fmt: skip
