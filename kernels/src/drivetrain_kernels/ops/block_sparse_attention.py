"""Attention to some blocks of keys only, and its gradients (Child et al. 2019, arXiv 1904.10509).

Which blocks a query sees is a list: block row i of queries sees the blocks ``columns[starts[i]]``
to ``columns[starts[i + 1] - 1]`` of keys. The references gather these blocks and nothing else, so
time and memory of every implementation are linear in their number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from drivetrain_kernels.checks import Checker
from drivetrain_kernels.op import Op, Tolerance
from drivetrain_kernels.ops.block_sparse_examples import (
    backward_examples,
    backward_refusals,
    forward_examples,
    forward_refusals,
)
from drivetrain_kernels.registry import registry

_INT = torch.int32


class Visibility(NamedTuple):
    """What a query sees, beside the list of blocks.

    Args:
        query_segments: [b, s], int32, with ``key_segments``: a query sees keys of its number only.
        key_segments: [b, t], int32; numbers that no query has are padding.
        mask: [b or 1, entries, block, block] of queries by keys, bool: true may be seen. One block
            for each entry of ``columns``.
        bias: as ``mask``, floating, added to scores.
        block: tokens of a block of queries and of keys; the last block may be short.
        causal: token i of the queries sees keys up to token i.
        scale: of scores.
    """

    query_segments: torch.Tensor | None
    key_segments: torch.Tensor | None
    mask: torch.Tensor | None
    bias: torch.Tensor | None
    block: int
    causal: bool
    scale: float


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    columns: torch.Tensor,
    visible: Visibility,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the listed blocks of keys; sums are made in float32 with an online softmax.

    Args:
        query: [b, h, s, d]; the last dimension is contiguous.
        key: [b, h_kv, t, d], likewise, dtype of ``query``; h is a multiple of h_kv, and head i of
            queries reads head i / (h / h_kv) of keys.
        value: [b, h_kv, t, d_v], likewise.
        starts: [b or 1, h or 1, rows + 1], int32, of ceil(s / block) rows; places in ``columns``,
            which the lists of all heads and samples share, one after the other without gaps.
        columns: [entries], int32, each a block of keys, in ascending order within a row.
        visible: what else decides.

    Returns:
        The result [b, h, s, d_v] in the dtype of ``query``, heads innermost but one in memory; and
        the logarithm of the sum of exponentials of scores, [b, h, s], float32. A query that sees
        no key has zeros and minus infinity.

    Raises:
        ArgumentError: names the argument and what was expected. Contents of ``starts`` and
            ``columns`` are the caller's to keep right.
    """
    result: tuple[torch.Tensor, torch.Tensor] = BLOCK_SPARSE_ATTENTION.call(
        query, key, value, starts, columns, *visible
    )
    return result


def block_sparse_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    lists: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    visible: Visibility,
    *,
    bias_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of :func:`block_sparse_attention` (Dao et al. 2022, arXiv 2205.14135).

    Args:
        gradient: [b, h, s, d_v], of the result, dtype of ``query``.
        query: as in forward, and so ``key``, ``value`` and ``visible``.
        key: as in forward.
        value: as in forward.
        lse: [b, h, s], float32, forward's.
        delta: [b, h, s], float32: sum over d_v of gradient x result, minus the gradient of ``lse``.
        lists: ``starts`` and ``columns`` of forward, and the same by blocks of keys: ``starts``
            [b or 1, h or 1, columns + 1], the block row of queries of each, and its place in
            ``columns``, all int32, ascending within a column.
        visible: as in forward.
        bias_gradient: compute that of ``bias``, which then has blocks of its own for every head and
            sample.

    Returns:
        Gradients of query, key, value, and of bias as [b, entries of a sample, block, block] in
        float32 (empty unless asked for).

    Raises:
        ArgumentError: as forward's.
    """
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] = (
        BLOCK_SPARSE_ATTENTION_BACKWARD.call(
            gradient, query, key, value, lse, delta, *lists, *visible, bias_gradient
        )
    )
    return result


def heads_inside(like: torch.Tensor, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Memory for a result [b, h, s, width] that lies as [b, s, h, width]."""
    b, h, s = like.shape[:3]
    return torch.empty(b, s, h, width, dtype=dtype or like.dtype, device=like.device).transpose(
        1, 2
    )


# -- the reference ---------------------------------------------------------------------------------


class _Entries(NamedTuple):
    """One number for each block of scores of each sample and head."""

    sample: torch.Tensor
    head: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    entry: torch.Tensor


def _entries(starts: torch.Tensor, columns: torch.Tensor, batch: int, heads: int) -> _Entries:
    device = columns.device
    samples, listed_heads, rows = starts.shape[0], starts.shape[1], starts.shape[2] - 1
    places = torch.arange(samples * listed_heads * rows, device=device)
    counts = starts.diff(dim=2).flatten().long()
    place = places.repeat_interleave(counts, output_size=columns.numel())
    spread = (batch // samples, heads // listed_heads, columns.numel())
    of_list = place // rows
    sample, head = of_list // listed_heads, of_list % listed_heads
    if samples != batch:
        sample = torch.arange(batch, device=device)[:, None, None]
    if listed_heads != heads:
        head = torch.arange(heads, device=device)[None, :, None]
    entry = torch.arange(columns.numel(), device=device)
    numbers = (sample, head, place % rows, columns.long(), entry)
    return _Entries(*(number.expand(spread).flatten() for number in numbers))


def _blocks(x: torch.Tensor, block: int, dtype: torch.dtype) -> torch.Tensor:
    """[b, h, s, d] as [b, h, blocks, block, d], the last block filled up with zeros."""
    missing = -x.shape[2] % block
    padded = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, missing))
    return padded.reshape(*x.shape[:2], -1, block, x.shape[3])


def _scores(
    query: torch.Tensor, key: torch.Tensor, at: _Entries, visible: Visibility, lengths: list[int]
) -> torch.Tensor:
    """Scores [N, block, block] of gathered blocks; minus infinity where a key is hidden."""
    scores = query @ key.transpose(1, 2) * visible.scale
    if visible.bias is not None:
        scores = scores + visible.bias[at.sample % len(visible.bias), at.entry].to(scores.dtype)
    place = torch.arange(visible.block, device=query.device)
    rows = at.row[:, None] * visible.block + place
    columns = at.column[:, None] * visible.block + place
    seen = (columns < lengths[1])[:, None, :].expand_as(scores)
    if visible.causal:
        seen = seen & (columns[:, None, :] <= rows[:, :, None])
    if visible.query_segments is not None and visible.key_segments is not None:
        of_query = visible.query_segments[at.sample[:, None], rows.clamp(max=lengths[0] - 1)]
        of_key = visible.key_segments[at.sample[:, None], columns.clamp(max=lengths[1] - 1)]
        seen = seen & (of_query[:, :, None] == of_key[:, None, :])
    if visible.mask is not None:
        seen = seen & visible.mask[at.sample % len(visible.mask), at.entry]
    return scores.masked_fill(~seen, -torch.inf)


def _reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor,
    columns: torch.Tensor, *others: object,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    visible = Visibility(*others)  # type: ignore[arg-type]
    (b, h, s, _), block = query.shape, visible.block
    compute = torch.promote_types(query.dtype, torch.float32)
    at, group = _entries(starts, columns, b, h), h // key.shape[1]
    q, k, v = (_blocks(x, block, compute) for x in (query, key, value))
    of_keys = (at.sample, at.head // group, at.column)
    scores = _scores(q[at.sample, at.head, at.row], k[of_keys], at, visible, [s, key.shape[2]])
    rows = (at.sample * h + at.head) * q.shape[2] + at.row
    lse = _summed_exponentials(scores, rows, b * h * q.shape[2])
    weights = (scores - _finite(lse)[rows][..., None]).exp()
    sums = q.new_zeros(b * h * q.shape[2], block, value.shape[3])
    sums.index_add_(0, rows, weights @ v[of_keys])
    out = heads_inside(query, value.shape[3])
    out.copy_(sums.view(b, h, -1, value.shape[3])[:, :, :s])
    return out, lse.view(b, h, -1)[:, :, :s].contiguous()


def _summed_exponentials(scores: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Logarithm of the sum of exponentials of each query, [rows, block]."""
    block = scores.shape[1]
    index = rows[:, None].expand(-1, block)
    highest = scores.new_full((count, block), -torch.inf)
    highest.scatter_reduce_(0, index, scores.amax(2), "amax")
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    total = scores.new_zeros(count, block)
    total.index_add_(0, rows, (scores - highest[rows][..., None]).exp().sum(2))
    return total.log() + highest


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """So that queries that see nothing have weights of 0."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _backward_reference(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    lse: torch.Tensor, delta: torch.Tensor, starts: torch.Tensor, columns: torch.Tensor,
    back_starts: torch.Tensor, back_rows: torch.Tensor, back_entries: torch.Tensor,
    *others: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    visible, bias_gradient = Visibility(*others[:-1]), others[-1]  # type: ignore[arg-type]
    (b, h, s, _), block = query.shape, visible.block
    compute = torch.promote_types(query.dtype, torch.float32)
    at, group = _entries(starts, columns, b, h), h // key.shape[1]
    q, k, v, g = (_blocks(x, block, compute) for x in (query, key, value, gradient))
    line, inner = (
        _blocks(x[..., None], block, compute)[at.sample, at.head, at.row] for x in (lse, delta)
    )
    of_queries, of_keys = (at.sample, at.head, at.row), (at.sample, at.head // group, at.column)
    own, others_keys, g_own = q[of_queries], k[of_keys], g[of_queries]
    scores = _scores(own, others_keys, at, visible, [s, key.shape[2]])
    weights = (scores - _finite(line)).exp()
    for_scores = weights * (g_own @ v[of_keys].transpose(1, 2) - inner)
    for_bias = for_scores.float() if compute != torch.float64 else for_scores
    shape = (b, -1, block, block) if bias_gradient else (0,)
    for_bias = for_bias.reshape(shape) if bias_gradient else for_bias.new_empty(0)
    for_scores = for_scores * visible.scale
    results = []
    for x, index, parts in (
        (query, of_queries, for_scores @ others_keys),
        (key, of_keys, for_scores.transpose(1, 2) @ own),
        (value, of_keys, weights.transpose(1, 2) @ g_own),
    ):
        blocks = -(-x.shape[2] // block)
        place = (index[0] * x.shape[1] + index[1]) * blocks + index[2]
        sums = parts.new_zeros(b * x.shape[1] * blocks, block, x.shape[3])
        sums.index_add_(0, place, parts)
        results.append(heads_inside(x, x.shape[3]))
        results[-1].copy_(sums.view(b, x.shape[1], -1, x.shape[3])[:, :, : x.shape[2]])
    return results[0], results[1], results[2], for_bias


# -- checks ----------------------------------------------------------------------------------------


def _check_tensors(
    checker: Checker, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    checker.floating(query, "query")
    for name, x in (("query", query), ("key", key), ("value", value)):
        checker.dtype(x, name, query.dtype)
        checker.same_device(x, name, query.device)
        if x.dim() != 4 or (x.shape[3] > 1 and x.stride(3) != 1):
            raise checker.fail(name, f"is {list(x.shape)}", "[b, h, s, d], each token contiguous")
    wanted = [query.shape[0], key.shape[1], key.shape[2], query.shape[3]]
    if list(key.shape) != wanted or not key.shape[1] or query.shape[1] % key.shape[1]:
        expected = f"{wanted}, with heads that divide {query.shape[1]}"
        raise checker.fail("key", f"is {list(key.shape)}", expected)
    if value.shape[:3] != key.shape[:3]:
        raise checker.fail("value", f"is {list(value.shape)}", f"{list(key.shape[:3])} by any")


def _check_lists(
    checker: Checker, query: torch.Tensor, rows: int, starts: torch.Tensor, names: str,
    *numbers: torch.Tensor,
) -> None:  # fmt: skip
    of_starts, of_columns = names.split()
    wanted = f"int32 [1 or {query.shape[0]}, 1 or {query.shape[1]}, {rows + 1}]"
    shape = starts.shape
    fits = starts.dim() == 3 and shape[0] in (1, query.shape[0]) and shape[1] in (1, query.shape[1])
    if not fits or shape[2] != rows + 1 or starts.dtype != _INT or not starts.is_contiguous():
        raise checker.fail(of_starts, f"is {starts.dtype} {list(shape)}", wanted)
    for x in numbers:
        if x.dim() != 1 or x.dtype != _INT or not x.is_contiguous() or len(x) != len(numbers[0]):
            raise checker.fail(of_columns, f"is {x.dtype} {list(x.shape)}", "int32 [entries]")


def _check_visible(
    checker: Checker, query: torch.Tensor, keys: int, entries: int, visible: Visibility
) -> None:
    checker.number(visible.block, "block", low=1)
    b, s = query.shape[0], query.shape[2]
    pairs = (
        ("query_segments", visible.query_segments, s),
        ("key_segments", visible.key_segments, keys),
    )
    if (visible.query_segments is None) != (visible.key_segments is None):
        raise checker.fail("key_segments", "and query_segments are not both given", "both or none")
    for name, x, length in pairs:
        if x is not None and (
            list(x.shape) != [b, length] or x.dtype != _INT or not x.is_contiguous()
        ):
            raise checker.fail(name, f"is {x.dtype} {list(x.shape)}", f"int32 [{b}, {length}]")
    for name, x in (("mask", visible.mask), ("bias", visible.bias)):
        if x is None:
            continue
        wanted = [entries, visible.block, visible.block]
        if (
            x.dim() != 4
            or list(x.shape[1:]) != wanted
            or len(x) not in (1, b)
            or not x.is_contiguous()
        ):
            expected = f"contiguous [1 or {b}, {', '.join(map(str, wanted))}]"
            raise checker.fail(name, f"is {list(x.shape)}", expected)
        if name == "mask":
            checker.dtype(x, name, torch.bool)
        else:
            checker.floating(x, name, (torch.float32,))


def _check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor,
    columns: torch.Tensor, *others: object,
) -> None:  # fmt: skip
    checker, visible = Checker("block_sparse_attention"), Visibility(*others)  # type: ignore[arg-type]
    _check_tensors(checker, query, key, value)
    checker.number(visible.block, "block", low=1)
    rows = -(-query.shape[2] // visible.block)
    _check_lists(checker, query, rows, starts, "starts columns", columns)
    _check_visible(checker, query, key.shape[2], len(columns), visible)


def _backward_check(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    lse: torch.Tensor, delta: torch.Tensor, starts: torch.Tensor, columns: torch.Tensor,
    back_starts: torch.Tensor, back_rows: torch.Tensor, back_entries: torch.Tensor,
    *others: object,
) -> None:  # fmt: skip
    checker = Checker("block_sparse_attention_backward")
    visible = Visibility(*others[:-1])  # type: ignore[arg-type]
    _check_tensors(checker, query, key, value)
    checker.number(visible.block, "block", low=1)
    wanted = [*query.shape[:3], value.shape[3]]
    if list(gradient.shape) != wanted or (wanted[3] > 1 and gradient.stride(3) != 1):
        raise checker.fail("gradient", f"is {list(gradient.shape)}", f"{wanted}, dense tokens")
    checker.dtype(gradient, "gradient", query.dtype)
    for name, x in (("lse", lse), ("delta", delta)):
        checker.floating(x, name, (torch.float32,))
        if x.shape != query.shape[:3] or not x.is_contiguous():
            raise checker.fail(name, f"is {list(x.shape)}", f"contiguous {wanted[:3]}")
    rows, blocks = (-(-x.shape[2] // visible.block) for x in (query, key))
    _check_lists(checker, query, rows, starts, "starts columns", columns)
    numbers = (columns, back_rows, back_entries)
    _check_lists(checker, query, blocks, back_starts, "back_starts back_rows", *numbers)
    _check_visible(checker, query, key.shape[2], len(columns), visible)
    if others[-1]:
        own = starts.shape[1] == query.shape[1]
        bias = visible.bias
        if bias is None or not own or starts.shape[0] * len(bias) != query.shape[0]:
            expected = "a bias with blocks of its own for every head and sample"
            raise checker.fail("bias_gradient", "is asked for", expected)


def _fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return heads_inside(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=wide)


def _backward_fake(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    *rest: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    block, bias_gradient, columns = rest[11], rest[-1], rest[3]
    assert isinstance(block, int)
    assert isinstance(columns, torch.Tensor)
    wide = torch.promote_types(query.dtype, torch.float32)
    bias = query.new_empty(0, dtype=wide)
    if bias_gradient:
        starts = rest[2]
        assert isinstance(starts, torch.Tensor)
        entries = len(columns) // starts.shape[0]
        bias = query.new_empty(query.shape[0], entries, block, block, dtype=wide)
    grads = [heads_inside(x, x.shape[3]) for x in (query, key, value)]
    return grads[0], grads[1], grads[2], bias


_VISIBLE = (
    "Tensor? query_segments, Tensor? key_segments, Tensor? mask, Tensor? bias, int block, "
    "bool causal, float scale"
)
_TOLERANCE = Tolerance(
    {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2},
    {torch.float64: 1e-9, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
)

BLOCK_SPARSE_ATTENTION = registry.define(
    Op(
        "block_sparse_attention",
        "(Tensor query, Tensor key, Tensor value, Tensor starts, Tensor columns, "
        f"{_VISIBLE}) -> (Tensor, Tensor)",
        reference=_reference,
        check=_check,
        examples=forward_examples,
        refusals=forward_refusals,
        fake=_fake,
        tolerance=_TOLERANCE,
        group="attention",
    )
)
BLOCK_SPARSE_ATTENTION_BACKWARD = registry.define(
    Op(
        "block_sparse_attention_backward",
        "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor lse, Tensor delta, "
        "Tensor starts, Tensor columns, Tensor back_starts, Tensor back_rows, Tensor back_entries, "
        f"{_VISIBLE}, bool bias_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
        reference=_backward_reference,
        check=_backward_check,
        examples=backward_examples,
        refusals=backward_refusals,
        fake=_backward_fake,
        tolerance=_TOLERANCE,
        group="attention",
    )
)
