"""Keys and values that ranks pass on to each other in a ring (Liu et al. 2023, arXiv 2310.01889).

Each rank keeps its queries, and sees the keys of all others one after the other; those of the next
are on their way meanwhile. Where heads run out this still works, at the price of traffic that grows
with the sequence: 2 S h_kv (R - 1) / R elements leave each of R ranks in forward. In backward, keys
and values go round again, and their gradients with them, one step further, to where they belong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from drivetrain.communication.functional import Functional
from drivetrain.contracts import Attention, AttentionFacts, Handle
from drivetrain.errors import TrainingError
from drivetrain_sequence.blocks import Gradients, Scoring, Sums
from drivetrain_sequence.layout import Cut
from drivetrain_sequence.section import PATH
from drivetrain_sequence.turn import Turn
from drivetrain_sequence.visible import Seen


@dataclass(frozen=True)
class Ring:
    """The ranks of a ring, in order, and where the tokens of each are.

    Args:
        line: the ranks.
        cut: how sequences are shared out.
    """

    line: Functional
    cut: Cut

    def runs(self, length: int, back: int) -> list[range]:
        """Places of the tokens ``back`` ranks before this one, of S = ``length`` tokens."""
        return self.cut.runs(length, (self.line.rank - back) % self.line.size)

    def pass_on(self, x: torch.Tensor) -> tuple[torch.Tensor, Handle]:
        """Start sending ``x`` to the next rank, and receiving its like from the one before."""
        came = torch.empty_like(x)
        line, size = self.line, self.line.size
        to, source = (line.rank + 1) % size, (line.rank - 1) % size
        messages = ([(x, to)], [(came, source)], line.axis, line.tag)
        return came, line.communicator.send_receive(*messages, asynchronous=True)


def pass_keys_on(inner: Attention, ring: Ring, turn: Turn) -> Attention:
    """Attend to the keys of all ranks of a ring while tokens are in parts, else as ``inner``."""

    def attend_in_ring(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        facts: AttentionFacts,
    ) -> torch.Tensor:
        if not turn.in_parts(module):
            return inner(module, query, key, value, facts)
        check_by_blocks(facts, f"{PATH}.ring_size", "use ring_size 1")
        visible = Seen.by(facts, query.shape[2] * ring.line.size, query)
        if facts.segments is not None:
            segments = facts.segments.expand(query.shape[0], -1)
            visible.segments = _in_order(segments, ring, query.shape[2] * ring.line.size)
        arguments = (ring, scoring_of(facts, query), visible)
        output: torch.Tensor = _Ring.apply(query, key, value, facts.sinks, *arguments)  # type: ignore[no-untyped-call]
        return output.transpose(1, 2)

    return attend_in_ring


def scoring_of(facts: AttentionFacts, query: torch.Tensor) -> Scoring:
    """How the scores of an attention are made.

    Raises:
        TrainingError: slopes that train.
    """
    slopes = facts.slopes
    if slopes is not None and slopes.requires_grad:
        raise TrainingError(
            "slopes of attention that train have no gradient where it is computed by blocks of "
            f"keys ({PATH}.ring_size, {PATH}.chunk): detach them"
        )
    scale = query.shape[-1] ** -0.5 if facts.scale is None else facts.scale
    return Scoring(scale, facts.softcap, slopes)


def not_by_blocks(facts: AttentionFacts) -> list[str]:
    """What attention has that is not computed block by block."""
    lacks = {
        "dropout of attention weights": facts.dropout > 0,
        "a bias of scores": facts.bias is not None,
        "a mask that is a tensor": isinstance(facts.mask, torch.Tensor),
    }
    return [what for what, given in lacks.items() if given]


def check_by_blocks(facts: AttentionFacts, key: str, advice: str) -> None:
    """Refuse what is not computed block by block.

    Raises:
        TrainingError: with the config's ``key`` that has attention computed by blocks.
    """
    if found := not_by_blocks(facts):
        raise TrainingError(
            f"attention has {' and '.join(found)}, which is not computed by blocks of keys "
            f"({key}): {advice}"
        )


def _in_order(own: torch.Tensor, ring: Ring, length: int) -> torch.Tensor:
    """What each rank of a ring has of its tokens [b, s], of all tokens [b, S]."""
    joined = ring.line.all_gather(own.detach(), dim=1)
    found = torch.empty_like(joined)
    order = torch.cat([ring.cut.of_ring(length, rank) for rank in range(ring.line.size)])
    found[:, order.to(own.device)] = joined
    return found


class _Ring(torch.autograd.Function):
    """[b, h, s, d] of this rank, with the keys of all; see the module."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        ring: Ring,
        scoring: Scoring,
        visible: Seen,
    ) -> torch.Tensor:
        sums, own = Sums.none(query, value.shape[-1]), key.shape[-1]
        both = torch.cat([key, value], -1).contiguous()
        for back in range(ring.line.size):
            following = ring.pass_on(both) if back + 1 < ring.line.size else None
            for rows, columns, runs in _pairs(ring, query, key, back):
                part = both[:, :, columns]
                tensors = (query[:, :, rows], part[..., :own], part[..., own:])
                sums.part(rows).attend(*tensors, runs, scoring, visible)
            if following is not None:
                both, handle = following
                handle.wait()
        if sinks is not None:
            sums.see_sinks(sinks)
        ctx.ring, ctx.scoring, ctx.visible = ring, scoring, visible
        output = sums.output.to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, output, sums.lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, sinks, output, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        sums, own = Gradients.of(query, gradient, output, lse), key.shape[-1]
        both = torch.cat([key, value], -1).contiguous()
        travelling = torch.zeros_like(both, dtype=lse.dtype)
        for back in range(ring.line.size):
            following = ring.pass_on(both) if back + 1 < ring.line.size else None
            for rows, columns, runs in _pairs(ring, query, key, back):
                part = both[:, :, columns]
                tensors = (query[:, :, rows], part[..., :own], part[..., own:])
                found = sums.part(rows).attend(*tensors, runs, ctx.scoring, ctx.visible)
                if found is not None:
                    travelling[:, :, columns] += torch.cat(found, -1)
            if ring.line.size > 1:
                travelling, arrived = ring.pass_on(travelling)
                arrived.wait()
            if following is not None:
                both, handle = following
                handle.wait()
        for_key, for_value = travelling[..., :own], travelling[..., own:]
        for_sinks = None if sinks is None else sums.of_sinks(sinks)
        back_to = (sums.query.to(query.dtype), for_key.to(key.dtype), for_value.to(value.dtype))
        return *back_to, for_sinks, None, None, None


def _pairs(
    ring: Ring, query: torch.Tensor, key: torch.Tensor, back: int
) -> Iterator[tuple[slice, slice, tuple[range, range]]]:
    """Pairs of a run of own queries and one of the keys ``back`` ranks before, and their places."""
    mine, others = (
        ring.runs(x.shape[2] * ring.line.size, steps) for x, steps in ((query, 0), (key, back))
    )
    for (i, q), (j, k) in product(enumerate(mine), enumerate(others)):
        rows, columns = (slice(n * len(run), (n + 1) * len(run)) for n, run in ((i, q), (j, k)))
        yield rows, columns, (q, k)
