"""How a region is shared out: which input features of its rows, and outputs of its columns.

A perturbation of some outputs of a column changes some inputs of a row. Where these fall into
groups that have nothing to do with each other (heads of attention, neurons of an MLP), ranks get
whole groups, in whatever order a fused projection has them. What every group reads (keys and values
of few heads) is computed once and gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, groupby
from math import gcd

import torch

from drivetrain_tensor.layout import Outputs, Runs, runs, shares
from drivetrain_tensor.probing import Probe, by_sample
from drivetrain_tensor.products import Product
from drivetrain_tensor.regions import Region

_BLOCKS = 1024
_COARSEST = 16
"""Features that are perturbed together, in large layers: no more than divide common head sizes."""
_ROWS = 256
"""Perturbations of one run."""
_FEW = 128
"""Single features that are tried first, of all sources together."""
_BATCH = 10
"""Least of them, so that a batch is not taken for a number of tokens."""
_WIDTHS = 5
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Cut:
    """What each rank has of a region.

    Args:
        inputs: for each consumer, by its number in the region, and rank: its input features.
        outputs: for each source its output features.
        groups: number of independent groups of features; those of a rank are consecutive.
        whole: whether every rank computes the whole region, and only the layers are cut.
    """

    inputs: tuple[tuple[Runs, ...], ...]
    outputs: tuple[Outputs, ...]
    groups: tuple[tuple[int, int], ...]
    whole: bool = False


class TooFewGroups(Exception):  # noqa: N818 - what was found, not what went wrong
    """There are fewer independent groups than ranks.

    Args:
        groups: how many there are.
    """

    def __init__(self, groups: int) -> None:
        super().__init__(groups)
        self.groups = groups


class NotBatched(Exception):  # noqa: N818 - what was found, not what went wrong
    """The model cannot be run with several samples at once."""


def cut_region(probe: Probe, region: Region, ranks: int) -> Cut:
    """Share out a region among ``ranks`` ranks.

    Raises:
        TooFewGroups: its features do not fall into as many groups.
    """
    if _mixes(probe, region):
        raise TooFewGroups(1)
    sizes = [p.outputs for p in region.sources] + [p.inputs for p in region.consumers]
    divisor = gcd(*sizes)
    unit = 1
    while sum(sizes) // unit > _BLOCKS and unit < _COARSEST and divisor % (2 * unit) == 0:
        unit *= 2
    while True:
        try:
            return _cut(probe, region, ranks, unit)
        except TooFewGroups:
            if unit == 1:
                raise
        unit //= 2  # groups may begin inside of blocks of this size


def _mixes(probe: Probe, region: Region) -> bool:
    """Whether some features of all sources each change all inputs of a layer, or none.

    So it is where a norm lies behind a sum of all blocks. Every block is a source there, so that
    trying all their features, in ever finer units, would take a time that grows with the square of
    the number of blocks, and there would still be one group.
    """
    sources = [product for product in region.sources if product not in probe.alone]
    if not sources:
        return False
    each = max(1, _FEW // len(sources))
    step = -(-len(sources) // _FEW)  # beyond that many, some of them stand for the others
    tried = [
        (product, start)
        for product in sources[::step]
        for start in sorted({i * (product.outputs - 1) // max(1, each - 1) for i in range(each)})
    ]
    # So much that it shows in each of thousands of features that a norm computes from.
    reach = _changes(probe, region, tried, 1, factor=-1e3)
    some = torch.zeros(len(region.consumers), dtype=torch.bool)
    sizes = [product.inputs for product in region.consumers]
    for number, part in enumerate(torch.split(reach, sizes, 1)):
        if bool((part.any(1) != part.all(1)).any()):
            return False
        some[number] = part.any()
    return bool(some.all())


def gathered(region: Region, cut: Cut) -> Cut:
    """Cut the layers alike, where every rank computes all that lies between them."""
    ranks = len(cut.groups)
    everyone = tuple(range(ranks))
    outputs = [Outputs.of([everyone] * p.outputs, ranks) for p in region.sources]
    return Cut(cut.inputs, tuple(outputs), cut.groups, whole=True)


def _cut(probe: Probe, region: Region, ranks: int, unit: int) -> Cut:
    reach = _reach(probe, region, unit)
    extents = [p.inputs // unit for p in region.consumers]
    rank_of, count = _ranks_of_blocks(reach, extents, ranks)
    inputs, start = [], 0
    for extent in extents:
        own = rank_of[start : start + extent]
        inputs.append(tuple(_runs(own == rank, unit) for rank in range(ranks)))
        start += extent
    users = torch.stack([reach[:, rank_of == rank].any(1) for rank in range(ranks)], 1)
    outputs, start = [], 0
    for product in region.sources:
        blocks = users[start : start + product.outputs // unit]
        outputs.append(Outputs.of(list(_users(blocks, unit)), ranks))
        start += len(blocks)
    return Cut(tuple(inputs), tuple(outputs), tuple(shares(count, ranks)))


def _reach(probe: Probe, region: Region, unit: int) -> torch.Tensor:
    """[blocks of sources, blocks of consumers]: whether a change of one changes the other."""
    blocks = [
        (product, start) for product in region.sources for start in range(0, product.outputs, unit)
    ]
    return torch.cat(
        [_changes(probe, region, changed, unit) for changed in _runs_of(probe, blocks)]
    )


def _runs_of(
    probe: Probe, blocks: list[tuple[Product, int]]
) -> Iterator[list[tuple[Product, int]]]:
    """Perturbations that go into one run: one for each sample of a batch."""
    for _, some in groupby(blocks, key=lambda block: block[0] in probe.alone):
        chunk = list(some)
        size = 1 if chunk[0][0] in probe.alone else _ROWS
        for first in range(0, len(chunk), size):
            yield chunk[first : first + size]


def _changes(
    probe: Probe,
    region: Region,
    changed: list[tuple[Product, int]],
    unit: int,
    factor: float = -1.7,
) -> torch.Tensor:
    """[perturbations, blocks of consumers]: what each perturbation, by ``factor``, changes."""
    alone = changed[0][0] in probe.alone
    batch = 1 if alone else max(len(changed), _BATCH) + 1

    def answer(product: Product, base: torch.Tensor) -> torch.Tensor:
        mine = [(row, start) for row, (which, start) in enumerate(changed, 1) if which is product]
        if not mine:
            return base
        y = base.repeat(1 if alone else batch, 1, 1)
        for row, start in mine:
            # The other sign, so that what an activation cuts off shows on one side.
            y[0 if alone else row, :, start : start + unit] *= factor
        return y

    last = region.consumers[-1]
    trace = probe.run(answer, batch=batch, last=last)
    if trace.error is not None:
        raise NotBatched(trace.error)
    before = probe.run(last=last) if alone else trace
    rows = []
    for consumer in region.consumers:
        reached = torch.zeros(len(changed), consumer.inputs, dtype=torch.bool)
        for x, was in zip(trace.inputs(consumer), before.inputs(consumer), strict=True):
            if not x.numel() or x.shape[:-1].numel() % batch:  # experts get the tokens they draw
                raise NotBatched(f"how many rows {consumer.path} gets depends on their values")
            values, first = by_sample(x, batch), by_sample(was, batch)[:1]
            values = values if alone else values[1 : len(changed) + 1]
            difference = (values - first).abs().amax(1)
            reached |= difference > _TOLERANCE * (1 + first.abs().max())
        rows.append(reached.view(len(changed), -1, unit).any(2))
    return torch.cat(rows, 1)


def _ranks_of_blocks(
    reach: torch.Tensor, extents: list[int], ranks: int
) -> tuple[torch.Tensor, int]:
    """The rank that each block of inputs belongs to, and the number of groups."""
    consumer_of = torch.repeat_interleave(torch.tensor(extents))
    fans = torch.stack([reach[:, consumer_of == c].sum(1) for c in range(len(extents))]).amax(0)
    most = 0
    for narrow in _without_wide(reach, fans):
        labels = _labels(narrow)
        numbers = [torch.unique(labels[consumer_of == c]) for c in range(len(extents))]
        most = max(most, min(map(len, numbers)))
        if min(map(len, numbers)) >= ranks:
            found = _shared_out(labels, numbers, ranks)
            if found is not None:
                return found, len(numbers[0])
    raise TooFewGroups(most)


def _without_wide(reach: torch.Tensor, fans: torch.Tensor) -> Iterator[torch.Tensor]:
    """What decides on groups: all outputs, or all but those that would join groups.

    These are gathered, so that there are as few of them as possible: less than those that stay, or
    all that reach everything, as queries and keys do if a norm goes over all heads. Outputs are
    told apart by how many inputs they reach and how many others reach the same: a value that all
    heads read may reach as many as a query does, where a head has as many features as there are.
    """
    live = fans > 0
    _, pattern, alike = torch.unique(reach, dim=0, return_inverse=True, return_counts=True)
    kinds = torch.stack([fans, alike[pattern]], 1)
    widths = torch.unique(kinds[live], dim=0)
    found: list[tuple[int, int, torch.Tensor]] = []
    for count in range(min(len(widths), _WIDTHS)):
        for wide in combinations(widths, count):
            gone = torch.zeros_like(live)
            for kind in wide:
                gone |= live & (kinds == kind).all(1)
            kept = reach[live & ~gone]
            of_all = count > 0 and all(int(kind[0]) == reach.shape[1] for kind in wide)
            few = 2 * int(gone.sum()) <= int(live.sum()) or of_all
            if few and bool(kept.any(0).all()):
                found.append((int(gone.sum()), len(found), kept))
    yield from (kept for _, _, kept in sorted(found, key=lambda each: each[:2]))


def _labels(reach: torch.Tensor) -> torch.Tensor:
    """For each block of inputs the first one of its group."""
    near = (reach.float().T @ reach.float()) > 0
    near.fill_diagonal_(True)
    labels = torch.arange(reach.shape[1])
    while True:
        spread = torch.where(near, labels[None], reach.shape[1]).amin(1)
        spread = spread[spread]
        if torch.equal(spread, labels):
            return labels
        labels = spread


def _shared_out(
    labels: torch.Tensor, numbers: list[torch.Tensor], ranks: int
) -> torch.Tensor | None:
    """Give consecutive groups to each rank, the same in all consumers that share groups."""
    rank_of: dict[int, int] = {}
    for groups in numbers:
        for rank, (start, stop) in enumerate(shares(len(groups), ranks)):
            for label in groups[start:stop].tolist():
                if rank_of.setdefault(label, rank) != rank:
                    return None
    return torch.tensor([rank_of[label] for label in labels.tolist()])


def _runs(own: torch.Tensor, unit: int) -> Runs:
    blocks = own.nonzero().flatten().tolist()
    return runs(block * unit + i for block in blocks for i in range(unit))


def _users(blocks: torch.Tensor, unit: int) -> Iterator[tuple[int, ...]]:
    """For each feature the ranks that use it; what none uses is some rank's all the same."""
    ranks = blocks.shape[1]
    for number, row in enumerate(blocks):
        who = tuple(row.nonzero().flatten().tolist()) or (number * ranks // len(blocks),)
        yield from [who] * unit
