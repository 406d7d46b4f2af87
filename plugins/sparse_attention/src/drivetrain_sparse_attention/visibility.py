"""What a mask, whatever it is given as, says about the listed blocks, and nothing else of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from drivetrain_kernels import BlockLists, Visibility, block_lists

from drivetrain.contracts import AttentionFacts, MaskRule
from drivetrain.errors import TrainingError

_PADDING = torch.iinfo(torch.int32).min


@dataclass(frozen=True, eq=False)
class Blocks:
    """A layout as attention uses it.

    Args:
        seen: [b or 1, h or 1, rows, columns], bool, on the device.
        size: tokens of a block.
        lists: of ``seen``.
        has_diagonal: every block of queries sees the block of the same place.
    """

    seen: torch.Tensor
    size: int
    lists: BlockLists
    has_diagonal: bool

    @classmethod
    def of(cls, seen: torch.Tensor, size: int) -> Blocks:
        """Make the lists of ``seen``.

        Raises:
            TrainingError: a block of queries sees no block of keys.
        """
        empty = ~seen.any(3)
        if bool(empty.any()):
            _, head, row = (int(number) for number in empty.nonzero()[0])
            raise TrainingError(
                f"the layout of head {head} has an empty row: queries of block {row} would attend "
                "to nothing; let every row have a block (in a causal model up to its own)"
            )
        diagonal = bool(seen.diagonal(dim1=2, dim2=3).all())
        return cls(seen, size, block_lists(seen), diagonal)

    def for_heads(self, heads: int) -> Blocks:
        """The same, with lists of its own for every head."""
        if self.seen.shape[1] == heads:
            return self
        return Blocks.of(self.seen.expand(-1, heads, -1, -1), self.size)

    def places(self, queries: int, keys: int) -> tuple[torch.Tensor, ...]:
        """Sample and head of each entry [entries], and tokens [entries, size] of both sides."""
        rows = self.lists.rows()
        count = self.lists.starts.shape[2] - 1
        heads = self.lists.starts.shape[1]
        inside = torch.arange(self.size, device=rows.device)
        of_query = (rows % count)[:, None] * self.size + inside
        of_key = self.lists.columns.long()[:, None] * self.size + inside
        of_list = rows // count
        tokens = (of_query.clamp(max=queries - 1), of_key.clamp(max=keys - 1))
        return of_list // heads, of_list % heads, *tokens


_blocks_of_rules: WeakKeyDictionary[MaskRule, tuple[Blocks, torch.Tensor]] = WeakKeyDictionary()


def visible_blocks(
    blocks: Blocks, facts: AttentionFacts, query: torch.Tensor, key: torch.Tensor
) -> tuple[Blocks, Visibility]:
    """What the facts of a call say about the listed blocks.

    Args:
        blocks: the layout.
        facts: of the call, without dropout, softcap and sinks.
        query: [b, h, s, d].
        key: [b, h_kv, t, d].

    Returns:
        The layout, with lists for each head if a mask differs by head, and what else decides.

    Raises:
        TrainingError: a mask of another shape.
    """
    lengths = (query.shape[2], key.shape[2])
    scale = query.shape[3] ** -0.5 if facts.scale is None else facts.scale
    told = _plainly(facts, query.shape[0], lengths[1])
    dense = [x for x in (told.tensor, facts.bias) if x is not None]
    differs = any(x.dim() == 4 and x.shape[1] > 1 for x in dense)
    if differs or facts.slopes is not None or any(x.requires_grad for x in dense):
        blocks = blocks.for_heads(query.shape[1])
    masks: list[torch.Tensor] = []
    biases: list[torch.Tensor] = []
    if told.rule is not None:
        masks.append(_of_rule(told.rule, blocks, query.shape[0], lengths))
    if told.window is not None:
        masks.append(_of_window(told.window, told.causal, blocks, lengths))
    for x in dense:
        found = _gathered(x, blocks, lengths)
        (masks if found.dtype == torch.bool else biases).append(found)
    if facts.slopes is not None:
        biases.append(_of_slopes(facts.slopes, blocks, lengths))
    mask = None
    for each in masks:
        mask = each if mask is None else mask & each
    bias = None
    for each in biases:
        bias = each if bias is None else bias + each
    of_queries, of_keys = _segments(facts.segments, told.real, query.shape[0], lengths, query)
    visible = Visibility(
        of_queries,
        of_keys,
        None if mask is None else mask.contiguous(),
        None if bias is None else bias.to(_float(query)).contiguous(),
        blocks.size,
        told.causal,
        scale,
    )
    return blocks, visible


def _float(query: torch.Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Told:
    """A mask, with what flags say as well taken out of it."""

    causal: bool
    window: int | None = None
    real: torch.Tensor | None = None
    tensor: torch.Tensor | None = None
    rule: MaskRule | None = None


def _plainly(facts: AttentionFacts, batch: int, keys: int) -> _Told:
    mask = facts.mask
    if isinstance(mask, MaskRule):
        real = None if mask.padding is None else mask.padding[:, :keys].bool().expand(batch, -1)
        kind = _kind_of(mask)
        if kind is not None:
            return _Told(kind == "causal", real=real)
        if mask.broadcasts:
            return _Told(False, real=real, rule=mask)
        tensor = mask.tensor
        if tensor is not None:
            return _Told(False, tensor=tensor)
        return _Told(facts.causal, facts.window)
    if mask is not None and mask.dtype == torch.bool and _of_keys_alone(mask, keys):
        real = mask.reshape(-1, keys).expand(batch, -1)
        return _Told(facts.causal, facts.window, real=real)
    return _Told(facts.causal, facts.window, tensor=mask)


def _of_keys_alone(mask: torch.Tensor, keys: int) -> bool:
    return mask.shape[-1] == keys and mask.dim() > 1 and all(n == 1 for n in mask.shape[1:-1])


def _kind_of(rule: MaskRule) -> str | None:
    """What a model's mask says beside padding, if flags say it as well."""
    masking: Any = sys.modules.get("transformers.masking_utils")
    if masking is None:
        return None
    if rule.allowed is masking.causal_mask_function:
        return "causal"
    return "all" if rule.allowed is masking.bidirectional_mask_function else None


def _of_rule(rule: MaskRule, blocks: Blocks, batch: int, lengths: tuple[int, int]) -> torch.Tensor:
    """[b or 1, entries, size, size], evaluated once for all layers that share rule and layout."""
    known = _blocks_of_rules.get(rule)
    if known is not None and known[0] is blocks:
        return known[1]
    samples = torch.arange(batch, device=blocks.seen.device).view(-1, 1, 1, 1)
    found = _evaluated(rule.allowed, blocks, samples, lengths)
    _blocks_of_rules[rule] = (blocks, found)
    return found


def _of_window(window: int, causal: bool, blocks: Blocks, lengths: tuple[int, int]) -> torch.Tensor:
    del causal  # said by a flag
    samples = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=blocks.seen.device)

    def near(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query - key).abs() < window

    return _evaluated(near, blocks, samples, lengths)


def _of_slopes(slopes: torch.Tensor, blocks: Blocks, lengths: tuple[int, int]) -> torch.Tensor:
    """What ALiBi adds to the listed blocks, whose lists are of every head."""
    _, head, queries, keys = blocks.places(*lengths)
    apart = (queries[:, :, None] - keys[:, None]).abs()
    return (apart * -slopes[head][:, None, None])[None]


def _evaluated(
    allowed: Callable[..., Any], blocks: Blocks, samples: torch.Tensor, lengths: tuple[int, int]
) -> torch.Tensor:
    of_sample, head, queries, keys = blocks.places(*lengths)
    if blocks.seen.shape[0] > 1:
        samples = of_sample[None, :, None, None]
    index = (samples, head[None, :, None, None], queries[None, :, :, None], keys[None, :, None])
    found = torch.as_tensor(allowed(*index), device=queries.device)
    shape = (1, len(queries), blocks.size, blocks.size)
    return found.broadcast_to(torch.broadcast_shapes(found.shape, shape))  # type: ignore[no-untyped-call]


def _gathered(x: torch.Tensor, blocks: Blocks, lengths: tuple[int, int]) -> torch.Tensor:
    """The listed blocks of a mask or bias that broadcasts to [b, h, s, t]."""
    x = x.reshape(*(1,) * (4 - x.dim()), *x.shape)
    if x.dim() != 4 or any(n not in (1, m) for n, m in zip(x.shape[2:], lengths, strict=True)):
        raise TrainingError(
            f"an attention mask of shape {tuple(x.shape)} does not broadcast to [b, h, "
            f"{lengths[0]}, {lengths[1]}]"
        )
    sample, head, queries, keys = blocks.places(*lengths)
    head = head[:, None, None] if x.shape[1] > 1 else torch.zeros_like(head)[:, None, None]
    rows = queries[:, :, None] if x.shape[2] > 1 else torch.zeros_like(queries)[:, :, None]
    columns = keys[:, None, :] if x.shape[3] > 1 else torch.zeros_like(keys)[:, None, :]
    if blocks.seen.shape[0] > 1:
        of_sample = sample[:, None, None] if len(x) > 1 else torch.zeros_like(head)
        return x[of_sample, head, rows, columns][None]
    return x[:, head, rows, columns]


def _segments(
    segments: torch.Tensor | None,
    real: torch.Tensor | None,
    batch: int,
    lengths: tuple[int, int],
    like: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Numbers of documents of queries and keys; that of padding is no query's."""
    if segments is None and real is None:
        return None, None
    if segments is None:
        zeros = torch.zeros(batch, max(lengths), dtype=torch.int32, device=like.device)
        of_queries, of_keys = zeros[:, : lengths[0]], zeros[:, : lengths[1]]
    else:
        if segments.shape[-1] != lengths[0] or lengths[0] != lengths[1]:
            raise TrainingError(
                f"segments of {segments.shape[-1]} tokens for {lengths[0]} queries and "
                f"{lengths[1]} keys"
            )
        of_queries = of_keys = segments.to(torch.int32).expand(batch, -1)
    if real is not None:
        if real.shape[-1] != lengths[1]:
            raise TrainingError(f"padding of {real.shape[-1]} tokens for {lengths[1]} keys")
        of_keys = of_keys.masked_fill(~real, _PADDING)
    return of_queries.contiguous(), of_keys.contiguous()
