"""Bring tokens to the ranks of their experts, and answers back.

One exchange of counts tells each rank how many tokens come for each of its experts; one all-to-all
of uneven rows brings them, and one brings the answers back. Backward runs the same two exchanges
the other way round, on every rank, whether or not it had any tokens.

[Note: order of issue] Exchanges are started and waited for later. In between a rank computes what
does not need them: shared experts, and the experts' answers for the other half of its tokens.
Backward goes through the nodes of the graph last made first, so what lies between a start and its
wait in forward lies between the adjoint's start and wait in backward, without further code.

[Note: dtype of rows] Under autocast rows travel in its dtype, to which the first product of an
expert would cast them; answers travel in the dtype in which rows came. So ranks send what others
expect, whatever experts return, and whether or not those of a rank got a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import pad

from drivetrain.communication.functional import Functional, functional
from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import ConfigError, TrainingError
from drivetrain_moe.own_numbers import OwnNumbers
from drivetrain_moe.permuting import Places, chosen, permuted, summed
from drivetrain_moe.routing import Routed

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_moe.axes import ExpertAxes

Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes tokens [n, d] in order of this rank's experts, and their numbers [experts here] on the
device; returns [n, d]."""


@dataclass(frozen=True)
class Way:
    """Between which ranks tokens travel, and how.

    Args:
        experts: over ranks that have other experts; ``None`` if this rank has all of them.
        alike: over ranks that have the same tokens, each of which sends a share of them; ``None``
            where every rank has tokens of its own.
        halves: whether tokens travel in two halves, of which one travels while experts compute the
            other.
        equal: whether all ranks of ``experts`` have the same tokens, as those have that serve one
            model together. Then none travels: each rank computes its experts' part of the results,
            and these are summed.
    """

    experts: Functional | None = None
    alike: Functional | None = None
    halves: bool = False
    equal: bool = False


HERE = Way()
"""Tokens stay on their rank, which has all experts."""


def way_of(job: Job, name: str, axes: ExpertAxes, experts: nn.Module, *, halves: bool) -> Way:
    """The way of the tokens of the layer ``name`` with ``experts`` in a job.

    Raises:
        ConfigError: ranks have parts of an expert, and should have other experts, too.
    """
    tag = Tag(Purpose.ACTIVATION, name, "experts")
    shared = bool(axes.alike) and job.mesh.size(axes.alike) > 1
    for part, parameter in experts.named_parameters() if shared else ():
        if parameter in job.parameters and job.parameters.info(parameter).placement is not None:
            raise ConfigError(
                f"moe.over_tensor: ranks along {axes.alike} have parts of {name}.{part}, so they "
                "compute each expert together and cannot have other experts: leave it false, or "
                "use GroupedMLP, which stays whole"
            )
    return Way(
        functional(job.communicator, axes.experts, tag),
        functional(job.communicator, axes.alike, tag) if shared else None,
        halves,
    )


@dataclass(frozen=True)
class Mixed:
    """What :func:`through_experts` returns.

    Args:
        output: [S, d], the weighted sum of the experts' answers for each token.
        beside: results of ``meanwhile``, in its order.
    """

    output: torch.Tensor
    beside: list[torch.Tensor]


def through_experts(
    x: torch.Tensor,
    routed: Routed,
    experts: int,
    compute: Compute,
    way: Way = HERE,
    answers: Iterable[nn.Parameter] = (),
    meanwhile: Sequence[Callable[[], torch.Tensor]] = (),
) -> Mixed:
    """Have experts compute their tokens.

    Args:
        x: [S, d].
        routed: which tokens go where.
        experts: how many there are, on all ranks of ``way.experts``.
        compute: this rank's experts.
        way: between which ranks tokens travel.
        answers: parameters of this rank's experts, which get zeros as gradients where there is no
            token; without, ``compute`` is called all the same.
        meanwhile: what else is to be computed: the first while tokens travel, all others while
            answers do. See [Note: order of issue].
    """
    if way.alike is None:
        return _mixed(x, routed, experts, compute, way, answers, meanwhile)
    # Of other tokens experts draw other numbers, on ranks that draw the same ones outside.
    compute = OwnNumbers(x.device, way.alike.rank).around(compute)
    first, share = share_of(len(x), way.alike)
    padded = pad(x, (0, 0, 0, share * way.alike.size - len(x)))
    part = routed.between(first, first + share)
    own = _mixed(way.alike.split(padded), part, experts, compute, way, answers, meanwhile)
    return replace(own, output=way.alike.gather(own.output)[: len(x)])


def through_sorted(
    rows: torch.Tensor,
    counts: torch.Tensor,
    compute: Compute,
    way: Way,
    answers: Iterable[nn.Parameter] = (),
) -> torch.Tensor:
    """Have experts compute rows that are in their order already, without weights.

    They travel whole, also where ``way`` says in halves.

    Args:
        rows: [n, d] in order of the experts of all ranks.
        counts: [experts] rows of each.
        compute: this rank's experts.
        way: between which ranks rows travel.
        answers: as for :func:`through_experts`.

    Returns:
        [n, d], in the order of ``rows``.
    """
    if way.alike is None:
        return _sorted(rows, counts, compute, way, answers)
    compute = OwnNumbers(rows.device, way.alike.rank).around(compute)
    first, share = share_of(len(rows), way.alike)
    padded = pad(rows, (0, 0, 0, share * way.alike.size - len(rows)))
    expert = torch.arange(len(counts), device=rows.device).repeat_interleave(counts)
    own = expert[first : first + share]
    counts = torch.bincount(own, minlength=len(counts))
    found = _sorted(way.alike.split(padded)[: len(own)], counts, compute, way, answers)
    return way.alike.gather(pad(found, (0, 0, 0, share - len(own))))[: len(rows)]


def _sorted(
    rows: torch.Tensor,
    counts: torch.Tensor,
    compute: Compute,
    way: Way,
    answers: Iterable[nn.Parameter],
) -> torch.Tensor:
    if way.experts is None or way.experts.size == 1:
        return _computed(rows, counts, compute, answers)
    if way.equal:
        expert = torch.arange(len(counts), device=rows.device).repeat_interleave(counts)
        token, one = torch.arange(len(rows), device=rows.device), rows.new_ones(len(rows))
        none = one.new_zeros(())
        routed = Routed(token, expert, one, counts, none, none, none)
        return _summed(rows, routed, len(counts), compute, way.experts, answers, ()).output
    table = counts.view(1, way.experts.size, -1)
    return _travelled(rows, table, way.experts, compute, answers, ())[0]


def share_of(tokens: int, alike: Functional) -> tuple[int, int]:
    """The first token of this rank's share of ``tokens``, and how many a share has at most."""
    share = -(-tokens // alike.size)
    return share * alike.rank, share


def of_all_shares(values: torch.Tensor, alike: Functional) -> torch.Tensor:
    """``values`` [S, n] of equal tokens, whose gradients come from the ranks of their shares.

    A rank computes gradients of its own share alone; in backward they are gathered, so that every
    rank has all of them.
    """
    first, share = share_of(len(values), alike)
    own = alike.split(pad(values, (0, 0, 0, share * alike.size - len(values))))
    kept, real = values.detach(), max(0, min(share, len(values) - first))
    return torch.cat([kept[:first], own[:real], kept[first + real :]])


def _mixed(
    x: torch.Tensor,
    routed: Routed,
    experts: int,
    compute: Compute,
    way: Way,
    answers: Iterable[nn.Parameter],
    meanwhile: Sequence[Callable[[], torch.Tensor]],
) -> Mixed:
    travels = way.experts is not None and way.experts.size > 1
    if way.equal and way.experts is not None and travels:
        return _summed(x, routed, experts, compute, way.experts, answers, meanwhile)
    place, parts = routed.expert, 1
    if travels and way.halves:
        half = (2 * routed.token >= len(x)).long()
        routed, parts = routed.ordered(half.argsort(stable=True)), 2
        place = half.sort().values * experts + routed.expert
    places = Places.of(routed.token, len(x))
    rows = chosen(x, places)
    counts = torch.bincount(place, minlength=parts * experts)
    if way.experts is not None and travels:
        counts = counts.view(parts, way.experts.size, -1)
        back, beside = _travelled(rows, counts, way.experts, compute, answers, meanwhile)
    else:
        back = _computed(rows, counts, compute, answers)
        beside = [one() for one in meanwhile]
    return Mixed(_combined(back, routed.weight, places).to(back.dtype), beside)


def _combined(answers: torch.Tensor, weight: torch.Tensor, places: Places) -> torch.Tensor:
    """The weighted sum of the answers of each token, [S, d], in float32 at least."""
    dtype = torch.promote_types(answers.dtype, weight.dtype)  # routers are float32 at least
    return summed(answers.to(dtype), places, weight.to(dtype))


def _summed(
    x: torch.Tensor,
    routed: Routed,
    experts: int,
    compute: Compute,
    axis: Functional,
    answers: Iterable[nn.Parameter],
    meanwhile: Sequence[Callable[[], torch.Tensor]],
) -> Mixed:
    """The same where all ranks have the same tokens: one sum of results over ranks."""
    own = experts // axis.size
    number = routed.expert - own * axis.rank
    mine = routed.ordered(((number >= 0) & (number < own)).nonzero().squeeze(1))
    counts = torch.bincount(mine.expert - own * axis.rank, minlength=own)
    places = Places.of(mine.token, len(x))
    rows = _lowered(chosen(x, places))
    found = _computed(rows, counts, compute, answers).to(rows.dtype)
    part = _combined(found, mine.weight, places)
    started = axis.start("all_reduce", torch.cat([part, _told(x, part, axis)]))
    beside = [one() for one in meanwhile]
    return Mixed(_agreed(started.wait(), x, axis).to(found.dtype), beside)


def _told(x: torch.Tensor, part: torch.Tensor, axis: Functional) -> torch.Tensor:
    """Rows in which each rank tells the others the sum of its tokens."""
    width = part.shape[-1]
    told = part.new_zeros(-(-axis.size // width) * width)
    told[axis.rank] = x.detach().sum(dtype=torch.float32)
    return told.view(-1, width)


def _agreed(results: torch.Tensor, x: torch.Tensor, axis: Functional) -> torch.Tensor:
    """The results, without what ranks have told each other of their tokens.

    Raises:
        TrainingError: they have other tokens.
    """
    with torch.no_grad():
        sums = results[len(x) :].reshape(-1)[: axis.size]
        limit = 1e-3 * x.abs().sum(dtype=torch.float32)
        # Sums of tokens that are not finite cannot be compared, which is no reason to end a server.
        agree = (sums.max() - sums.min() <= limit) | ~sums.isfinite().any()
    if x.is_cuda:  # where nothing waits for the device
        torch._assert_async(agree)
    elif not x.is_meta and not bool(agree):
        raise TrainingError(
            f"ranks that serve experts together have other tokens in {axis.tag}: with a section "
            "inference all of them have to make the same calls; an engine without it computes "
            "other tokens on each"
        )
    return results[: len(x)]


def _travelled(
    rows: torch.Tensor,
    counts: torch.Tensor,
    axis: Functional,
    compute: Compute,
    answers: Iterable[nn.Parameter],
    meanwhile: Sequence[Callable[[], torch.Tensor]],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Answers of all ranks' experts for ``rows``, and results of ``meanwhile``.

    ``rows`` are in order of parts, then of experts; ``counts`` [parts, ranks, experts of a rank]
    says how many there are of each.
    """
    parts, rows = len(counts), _lowered(rows)
    sent = axis.counts(counts.transpose(0, 1).reshape(axis.size, -1), len(rows))
    table = sent.table.view(axis.size, parts, -1)
    splits = [(sent.sent, sent.received)]
    if parts > 1:
        splits = torch.stack([counts.sum(2), table.sum(2).t()], 1).tolist()
    answers, returning = tuple(answers), list[Callable[[], torch.Tensor]]()
    pieces = torch.split(rows, [sum(to) for to, _ in splits]) if parts > 1 else [rows]
    # Where nothing is computed in between, no other thread is to be asked and waited for.
    going, coming = (parts > 1 or len(meanwhile) > other for other in (0, 1))
    outgoing = [
        _sent(axis, piece, to, of, overlaps=going)
        for piece, (to, of) in zip(pieces, splits, strict=True)
    ]
    beside = [one() for one in meanwhile[:1]]
    for part, (arrived, (to, of)) in enumerate(zip(outgoing, splits, strict=True)):
        came = arrived()
        order = _by_expert(table[:, part])
        back = torch.empty_like(order)  # answers go back in the order in which tokens came
        back[order] = torch.arange(len(order), device=order.device)
        rows = permuted(came, order, back)
        done = _computed(rows, table[:, part].sum(0), compute, answers)
        done = permuted(done.to(rows.dtype), back, order)
        returning.append(_sent(axis, done, of, to, overlaps=coming))
    beside += [one() for one in meanwhile[1:]]
    found = [arrived() for arrived in returning]
    return torch.cat(found) if parts > 1 else found[0], beside


def _sent(
    axis: Functional, rows: torch.Tensor, to: list[int], of: list[int], *, overlaps: bool
) -> Callable[[], torch.Tensor]:
    """Exchange rows, ``to[i]`` for rank i and ``of[i]`` from it; gives what comes when called."""
    if overlaps:
        return axis.start_exchange(rows, of, to).wait
    came = axis.exchange(rows, of, to)
    return lambda: came


def _by_expert(table: torch.Tensor) -> torch.Tensor:
    """An order that brings rows which came by rank, and by expert of each rank, to experts."""
    size, own = table.shape
    expert = torch.arange(own, device=table.device).repeat(size)
    return expert.repeat_interleave(table.reshape(-1)).argsort(stable=True)


def _lowered(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` in the dtype of autocast, if that would cast them; see [Note: dtype of rows]."""
    kind = rows.device.type
    if not torch.is_autocast_enabled(kind) or rows.dtype == torch.float64:
        return rows
    return rows.to(torch.get_autocast_dtype(kind))


def _computed(
    rows: torch.Tensor, counts: torch.Tensor, compute: Compute, answers: Iterable[nn.Parameter]
) -> torch.Tensor:
    answers = tuple(answers)
    if len(rows) or not answers:
        return compute(rows, counts)
    # Experts without tokens are part of the graph as others are: their gradients are zeros, and
    # backward comes through this layer, in whose exchanges others wait for this rank.
    return reaching(rows, *(p for p in answers if p.requires_grad))


def reaching(rows: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """``rows``, whose backward gives zeros to ``others`` and comes to what made them."""
    apply: Any = _Reaching.apply  # torch does not type it
    reached: torch.Tensor = apply(rows, *others)
    return reached


class _Reaching(torch.autograd.Function):
    """Nothing computed of no rows; the gradients of all that could have taken part are zeros."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        zeros = (
            torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.others
        )
        return gradient, *zeros
