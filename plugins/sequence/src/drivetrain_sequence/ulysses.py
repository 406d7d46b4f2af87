"""The layer of attention that exchanges heads over the ranks of a sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.communication.functional import Functional, functional
from drivetrain.contracts import Attention, AttentionFacts, MaskRule, Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain.modules.attention import torch_attention
from drivetrain_sequence.heads import HeadShare, from_heads, to_heads
from drivetrain_sequence.layout import Cut, layout_of, whole_rule
from drivetrain_sequence.plain import flags_of
from drivetrain_sequence.ring import not_by_blocks
from drivetrain_sequence.turn import Turn

if TYPE_CHECKING:
    from drivetrain.job.job import Job

LARGEST_MASK = 2**26
"""Bytes of the largest mask of all tokens by all tokens that is made as one tensor."""

_TAG = Tag(Purpose.ACTIVATION, key="attention", site="sequence parallelism")


def heads_line(job: Job, cut: Cut) -> Functional:
    """The ranks that exchange heads with this one."""
    first = job.mesh.coordinate("sp") // cut.heads * cut.heads
    axis = job.mesh.subgroup("sp", range(first, first + cut.heads))
    return functional(job.communicator, axis, _TAG)


def ring_line(job: Job, cut: Cut) -> Functional:
    """The ranks that pass keys on to this one and on from it."""
    first = job.mesh.coordinate("sp") % cut.heads
    axis = job.mesh.subgroup("sp", range(first, cut.ranks, cut.heads))
    return functional(job.communicator, axis, _TAG)


def exchange_heads(
    inner: Attention, by_blocks: Attention, by_chunks: Attention, line: Functional, turn: Turn
) -> Attention:
    """Put the exchange around ``inner``, which then sees all tokens of some heads.

    Args:
        inner: the function so far.
        by_blocks: passes keys on in a ring; or computes what has too large a mask for a tensor.
        by_chunks: sees a chunk of all tokens.
        line: the ranks that exchange heads.
        turn: whether there is something to exchange.
    """
    plain = inner is torch_attention  # what computes in its place needs no tensor for a mask

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        facts: AttentionFacts,
    ) -> torch.Tensor:
        if not (turn.in_parts(module) or facts.shared):
            return inner(module, query, key, value, facts)
        heads = query.shape[1]
        own = HeadShare.of(heads, key.shape[1], line.size).queries[line.rank]
        if facts.shared:
            compute, whole_of = inner, whole_facts
        elif len(turn.cut.chunks(query.shape[2] * line.size)) > 1 or turn.work is not None:
            compute, whole_of = by_chunks, part_facts
        elif turn.cut.ring > 1 or (plain and _is_large(facts, line, query, key)):
            compute, whole_of = by_blocks, part_facts
        else:
            compute, whole_of = inner, whole_facts
        whole = whole_of(facts, line, own, query, key)
        query, key, value = to_heads(line, query, key, value)
        return from_heads(line, compute(module, query, key, value, whole), heads)

    return attend


def _is_large(
    facts: AttentionFacts, line: Functional, query: torch.Tensor, key: torch.Tensor
) -> bool:
    """Whether the mask of the whole sequence is better asked for block by block."""
    mask, length, keys = facts.mask, query.shape[2] * line.size, key.shape[2] * line.size
    plain = isinstance(mask, MaskRule) and flags_of(mask, layout_of(mask)) is not None
    if facts.segments is None and facts.window is None and (mask is None or plain):
        return False
    large = query.shape[0] * length * keys > LARGEST_MASK
    return large and not not_by_blocks(facts)


def part_facts(
    facts: AttentionFacts,
    line: Functional,
    heads: range,
    query: torch.Tensor,
    key: torch.Tensor,
) -> AttentionFacts:
    """The facts for a part of the sequence, a ring position's or a chunk, and this rank's heads."""
    del key
    return replace(
        facts,
        sinks=_of_heads(facts.sinks, heads),
        slopes=_of_heads(facts.slopes, heads),
        positions=_joined(facts.positions, line, query),
        segments=_joined(facts.segments, line, query),
    )


def whole_facts(
    facts: AttentionFacts,
    line: Functional,
    heads: range,
    query: torch.Tensor,
    key: torch.Tensor,
) -> AttentionFacts:
    """The facts for all tokens and the heads of this rank.

    Args:
        facts: for this rank's tokens and all heads.
        line: the ranks that exchange heads.
        heads: of this rank.
        query: [b, h, s, d], this rank's tokens.
        key: [b, h_kv, keys, d], alike; those of another sequence in cross attention.

    Raises:
        TrainingError: for what is known of this rank's tokens alone.
    """
    length, keys = query.shape[2] * line.size, key.shape[2] * line.size
    if facts.bias is not None and not _is_whole(facts.bias, heads, (length, keys)):
        raise TrainingError(
            "attention adds a bias to its scores that is made for this rank's tokens, so it knows "
            "nothing of the tokens of other ranks: this model cannot be trained with "
            "sequence_parallel_size"
        )
    mask = facts.mask
    if isinstance(mask, MaskRule):
        layout = layout_of(mask)
        plain = flags_of(mask, layout)
        whole = whole_rule(mask, layout, (length, keys), query.device)
        facts = replace(facts, mask=None, causal=plain == "causal") if plain else facts
        mask = None if plain else whole
    elif mask is not None:
        mask = _whole_mask(mask, heads, query.shape[1], (length, keys))
    return replace(
        facts,
        mask=mask,
        sinks=_of_heads(facts.sinks, heads),
        slopes=_of_heads(facts.slopes, heads),
        positions=_joined(facts.positions, line, query),
        segments=_joined(facts.segments, line, query),
    )


def _of_heads(x: torch.Tensor | None, heads: range) -> torch.Tensor | None:
    return None if x is None else x[heads.start : heads.stop]


def _is_whole(bias: torch.Tensor, heads: range, lengths: tuple[int, int]) -> bool:
    """Whether a bias is of all tokens and of this rank's heads."""
    fits = zip(bias.shape[-3:], (len(heads), *lengths), strict=True)
    return bias.dim() == 4 and all(have in (1, whole) for have, whole in fits)


def _whole_mask(
    mask: torch.Tensor, heads: range, all_heads: int, lengths: tuple[int, int]
) -> torch.Tensor:
    length, keys = lengths
    if mask.shape[-1] != keys or mask.shape[-2] not in (1, length):
        raise TrainingError(
            f"an attention mask of shape {tuple(mask.shape)} is not one of all {length} tokens: a "
            "rank of a sequence needs the mask of the whole sequence, [..., 1 or all, all]"
        )
    return (
        mask[:, heads.start : heads.stop]
        if mask.dim() == 4 and mask.shape[1] == all_heads
        else mask
    )


def _joined(own: torch.Tensor | None, line: Functional, query: torch.Tensor) -> torch.Tensor | None:
    """What every rank has of its tokens [b, s], of all tokens [b, S]."""
    if own is None:
        return None
    own = own.expand(query.shape[0], -1)
    return line.all_gather(own.detach(), dim=1)
