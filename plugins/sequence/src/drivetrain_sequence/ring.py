"""Keys and values that ranks pass on to each other in a ring (Liu et al. 2023, arXiv 2310.01889).

Each rank keeps its queries, and sees the keys of all others one after the other; those of the next
are on their way meanwhile. Where heads run out this still works, at the price of traffic that grows
with the sequence: 2 S h_kv (R - 1) / R elements leave each of R ranks in forward. In backward, keys
and values go round again, and their gradients with them, one step further, to where they belong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from drivetrain.communication.functional import Functional
from drivetrain.contracts import Attention, AttentionFacts, Handle, MaskRule
from drivetrain.errors import TrainingError
from drivetrain_sequence.blocks import Gradients, Sums, Visible, attend
from drivetrain_sequence.layout import Cut, layout_of, whole_rule
from drivetrain_sequence.plain import flags_of
from drivetrain_sequence.turn import Turn


@dataclass(frozen=True)
class Ring:
    """The ranks of a ring, in order, and where the tokens of each are.

    Args:
        line: the ranks.
        cut: how sequences are shared out.
    """

    line: Functional
    cut: Cut

    def places(self, length: int, back: int) -> list[torch.Tensor]:
        """Runs of places of the tokens ``back`` ranks before this one, of S = ``length`` tokens.

        A ring of one has all tokens in order.
        """
        position = (self.line.rank - back) % self.line.size
        return list(self.cut.of_ring(length, position).chunk(2 if self.cut.ring > 1 else 1))

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
        if not turn.in_parts:
            return inner(module, query, key, value, facts)
        _check(facts, query, key)
        visible = visible_of(facts, ring, query)
        scale = query.shape[-1] ** -0.5 if facts.scale is None else facts.scale
        output: torch.Tensor = _Ring.apply(query, key, value, ring, scale, visible)  # type: ignore[no-untyped-call]
        return output.transpose(1, 2)

    return attend_in_ring


def not_by_blocks(facts: AttentionFacts, query: torch.Tensor, key: torch.Tensor) -> list[str]:
    """What attention has that is not computed block by block."""
    lacks = {
        "dropout of attention weights": facts.dropout > 0,
        "a bias of scores": facts.bias is not None,
        "a softcap": facts.softcap is not None,
        "sinks": facts.sinks is not None,
        "a mask that is a tensor": isinstance(facts.mask, torch.Tensor),
        "keys of another sequence": query.shape[2] != key.shape[2],
    }
    return [what for what, given in lacks.items() if given]


def _check(facts: AttentionFacts, query: torch.Tensor, key: torch.Tensor) -> None:
    if found := not_by_blocks(facts, query, key):
        raise TrainingError(
            f"attention has {' and '.join(found)}, which ranks that pass keys on "
            "(sequence_parallel.ring_size) do not compute: use ring_size 1"
        )


def visible_of(facts: AttentionFacts, ring: Ring, query: torch.Tensor) -> Visible:
    """Which keys queries see, as a function of places; plain masks are decided run by run."""
    length = query.shape[2] * ring.line.size
    causal, window, rule, segments = facts.causal, facts.window, None, None
    if isinstance(facts.mask, MaskRule):
        layout = layout_of(facts.mask)
        plain = flags_of(facts.mask, layout)
        causal, window = plain == "causal", None
        rule = None if plain else whole_rule(facts.mask, layout, length, query.device)
    if facts.segments is not None:
        segments = _in_order(facts.segments.expand(query.shape[0], -1), ring, length)
    samples = torch.arange(query.shape[0], device=query.device).view(-1, 1, 1, 1)

    def visible(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | bool:
        first, last, start, end = (int(x) for x in (queries[0], queries[-1], keys[0], keys[-1]))
        if (causal and last < start) or (window is not None and first - end >= window):
            return False
        q, k = queries.to(query.device)[:, None], keys.to(query.device)
        terms = [q >= k] if causal and first < end else []
        if window is not None:
            terms.append((q - k).abs() < window)
        if segments is not None:
            terms.append(segments[samples, q] == segments[samples, k])
        if rule is not None:
            terms.append(torch.as_tensor(rule.allowed(samples, samples[:1] * 0, q, k)))
        if not terms:
            return True
        seen = terms[0]
        for term in terms[1:]:
            seen = seen & term
        return seen.expand(*([1] * (4 - seen.dim())), *seen.shape) if seen.dim() < 4 else seen

    return visible


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
        ring: Ring,
        scale: float,
        visible: Visible,
    ) -> torch.Tensor:
        sums = Sums.none(query, value.shape[-1])
        length, own = query.shape[2] * ring.line.size, key.shape[-1]
        both = torch.cat([key, value], -1).contiguous()
        for back in range(ring.line.size):
            following = ring.pass_on(both) if back + 1 < ring.line.size else None
            k, v = both[..., :own], both[..., own:]
            for_each_pair(ring, length, back, sums, (query, k, v), scale, visible)
            if following is not None:
                both, handle = following
                handle.wait()
        ctx.ring, ctx.scale, ctx.visible = ring, scale, visible
        output = sums.output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, sums.lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, output, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        length, own, dtype = query.shape[2] * ring.line.size, key.shape[-1], lse.dtype
        gradient = gradient.to(dtype)
        delta = (gradient * output.to(dtype)).sum(-1)
        sums = Gradients(gradient, delta, lse, torch.zeros_like(query, dtype=dtype))
        both = torch.cat([key, value], -1).contiguous()
        travelling = torch.zeros_like(both, dtype=dtype)
        for back in range(ring.line.size):
            following = ring.pass_on(both) if back + 1 < ring.line.size else None
            k, v = both[..., :own], both[..., own:]
            pairs = (query, k, v)
            travelling += _backward_pairs(ring, length, back, sums, pairs, ctx.scale, ctx.visible)
            if ring.line.size > 1:
                travelling, arrived = ring.pass_on(travelling)
                arrived.wait()
            if following is not None:
                both, handle = following
                handle.wait()
        for_key, for_value = travelling[..., :own], travelling[..., own:]
        back_to = (sums.query.to(query.dtype), for_key.to(key.dtype), for_value.to(value.dtype))
        return *back_to, None, None, None


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _runs(
    ring: Ring, length: int, back: int
) -> list[tuple[slice, torch.Tensor, slice, torch.Tensor]]:
    """Pairs of a run of own tokens and one of the tokens ``back`` ranks before."""
    mine, others = ring.places(length, 0), ring.places(length, back)
    size = len(mine[0])
    return [
        (slice(i * size, (i + 1) * size), q, slice(j * size, (j + 1) * size), k)
        for i, q in enumerate(mine)
        for j, k in enumerate(others)
    ]


def for_each_pair(
    ring: Ring,
    length: int,
    back: int,
    sums: Sums,
    tensors: Tensors,
    scale: float,
    visible: Visible,
) -> None:
    """Have all own queries see the keys that are ``back`` ranks from home."""
    query, key, value = tensors
    for rows, q, columns, k in _runs(ring, length, back):
        part = Sums(sums.output[:, :, rows], sums.lse[:, :, rows])
        k_part, v_part = key[:, :, columns], value[:, :, columns]
        attend(part, query[:, :, rows], k_part, v_part, (q, k), scale, visible)


def _backward_pairs(
    ring: Ring,
    length: int,
    back: int,
    sums: Gradients,
    tensors: Tensors,
    scale: float,
    visible: Visible,
) -> torch.Tensor:
    """The same in backward; returns the gradients of keys and values, side by side."""
    query, key, value = tensors
    shape = (*key.shape[:3], key.shape[3] + value.shape[3])
    found = key.new_zeros(shape, dtype=sums.query.dtype)
    for rows, q, columns, k in _runs(ring, length, back):
        facts = (sums.output, sums.delta, sums.lse, sums.query)
        part = Gradients(*(x[:, :, rows] for x in facts))
        k_part, v_part = key[:, :, columns], value[:, :, columns]
        own = part.attend(query[:, :, rows], k_part, v_part, (q, k), scale, visible)
        found[:, :, columns] += torch.cat(own, -1)
    return found
