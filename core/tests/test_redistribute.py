"""Fragments of any layout become those of any other, between ranks and in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from random import Random

import pytest
import torch
from bare_jobs import plan
from torch import nn

from drivetrain.checkpoint.redistribute import kept_on_host, redistribute
from drivetrain.contracts import (
    Box,
    Collective,
    CommunicatorWrapper,
    Fragment,
    Handle,
    interval_boxes,
    placed_boxes,
)
from drivetrain.contracts.world.collective import Kind
from drivetrain.engine.initialize import initialize
from drivetrain.errors import TrainingError
from drivetrain.job.job import Job
from drivetrain.plan.registry import Registry, core_entries
from drivetrain.testing import run_distributed
from drivetrain.testing.sharded import ShardedStates

SHAPES = {
    "scalar": (),
    "bias": (7,),
    "matrix": (5, 6),
    "tall": (17, 2),
    "cube": (3, 4, 5),
    "empty": (0, 3),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)


@dataclass(frozen=True)
class Spec:
    """A state tensor: what it is called, its shape and its dtype."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def whole(self) -> torch.Tensor:
        """Its numbers, which every dtype of :data:`DTYPES` has exactly."""
        start = len(self.name) + len(self.kind)
        count = torch.Size(self.shape).numel()
        return (torch.arange(start, start + count) % 120).reshape(self.shape)


@dataclass(eq=False)
class Held:
    """A fragment's memory, and how many bytes of copies are out at a time."""

    flat: torch.Tensor
    copies: bool = False
    out: list[int] = field(default_factory=lambda: [0, 0])

    def read(self) -> torch.Tensor:
        self.out[0] += self.flat.nbytes
        self.out[1] = max(self.out)
        return self.flat.clone() if self.copies else self.flat

    def write(self, values: torch.Tensor) -> None:
        assert values.shape == self.flat.shape
        self.out[0] -= self.flat.nbytes
        self.flat.copy_(values)


Boxes = Sequence[Sequence[Box]]
"""Of one tensor, by rank."""


def replicated(shape: tuple[int, ...], ranks: int, _random: Random) -> Boxes:
    count = torch.Size(shape).numel()
    return [list(interval_boxes(shape, 0, count)) for _ in range(ranks)]


def on_one(shape: tuple[int, ...], ranks: int, random: Random) -> Boxes:
    chosen = random.randrange(ranks)
    every = replicated(shape, ranks, random)
    return [boxes if rank == chosen else [] for rank, boxes in enumerate(every)]


def cuts(count: int, parts: int, random: Random) -> list[tuple[int, int]]:
    """Uneven intervals, some of them empty."""
    ends = sorted(random.randint(0, count) for _ in range(parts - 1))
    return list(zip([0, *ends], [*ends, count], strict=True))


def intervals(shape: tuple[int, ...], ranks: int, random: Random) -> Boxes:
    """As ZeRO cuts, with ends anywhere in a row."""
    count = torch.Size(shape).numel()
    return [list(interval_boxes(shape, *part)) for part in cuts(count, ranks, random)]


def columns(shape: tuple[int, ...], ranks: int, random: Random) -> Boxes:
    """Cut by columns over two halves of the ranks, as tensor parallelism does, then by ZeRO."""
    if len(shape) < 2 or ranks < 2:
        return intervals(shape, ranks, random)
    found: list[list[Box]] = []
    sizes = (ranks // 2, ranks - ranks // 2)
    for members, (low, high) in zip(sizes, cuts(shape[1], 2, random), strict=True):
        size = (shape[0], high - low, *shape[2:])
        place = Box((0, low, *[0] * (len(shape) - 2)), size, 0)
        parts = cuts(place.numel, members, random)
        found += [list(placed_boxes([place], *part)) for part in parts]
    return found


def tiles(shape: tuple[int, ...], ranks: int, random: Random) -> Boxes:
    """A grid of rectangles, each on some ranks, several of them in one fragment."""
    found: list[list[Box]] = [[] for _ in range(ranks)]
    filled = [0] * ranks
    for tile in product(*[cuts(extent, 3, random) for extent in shape]):
        offset, size = tuple(a for a, _ in tile), tuple(b - a for a, b in tile)
        for rank in random.sample(range(ranks), random.randint(1, ranks)):
            box = Box(offset, size, filled[rank])
            if box.numel:
                found[rank].append(box)
                filled[rank] += box.numel
    return found


LAYOUTS = (replicated, on_one, intervals, columns, tiles)


def fragment_of(spec: Spec, boxes: Sequence[Box], *, copies: bool = False) -> tuple[Fragment, Held]:
    held = Held(torch.full((sum(b.numel for b in boxes),), 121).to(spec.dtype), copies)
    fragment = Fragment(
        name=spec.name,
        kind=spec.kind,
        global_shape=spec.shape,
        dtype=spec.dtype,
        boxes=tuple(boxes),
        owner=True,
        home="test",
        read=held.read,
        write=held.write,
    )
    return fragment, held


def filled(spec: Spec, boxes: Sequence[Box], *, copies: bool = False) -> Fragment:
    fragment, held = fragment_of(spec, boxes, copies=copies)
    for box in boxes:
        box.of_storage(held.flat).copy_(box.of(spec.whole()))
    return fragment


def assert_filled(spec: Spec, boxes: Sequence[Box], held: Held, what: object) -> None:
    for box in boxes:
        expected = box.of(spec.whole()).to(spec.dtype)
        assert torch.equal(box.of_storage(held.flat), expected), (what, spec, box)


class Overheard(CommunicatorWrapper):
    """Counts collectives, and the largest one that carries numbers of fragments."""

    most = count = 0

    def run(self, collective: Collective) -> Handle:
        self.count += 1
        if collective.output.dtype is torch.uint8:
            assert collective.kind is Kind.ALL_TO_ALL
            self.most = max(self.most, collective.output.nbytes + collective.input.nbytes)
        return self.inner.run(collective)


@contextmanager
def overheard() -> Iterator[tuple[Job, Overheard]]:
    with Job.open(plan()) as job:
        heard = Overheard(job.communicator)
        job.communicator = heard
        yield job, heard


# -- functions that run on every rank --------------------------------------------------------------


def move_at_random(seeds: int) -> None:
    with overheard() as (job, heard):
        for seed in range(seeds):
            random = Random(seed)
            limit = random.choice([64, 256, 1 << 20])
            source, target = [], []
            for kind, (name, shape) in product(("master", "exp_avg"), SHAPES.items()):
                old, new = (random.choice(LAYOUTS)(shape, job.world_size, random) for _ in "ab")
                specs = [Spec(name, kind, shape, random.choice(DTYPES)) for _ in "ab"]
                source.append(filled(specs[0], old[job.rank], copies=random.random() < 0.5))
                boxes = new[job.rank]
                fragment, held = fragment_of(specs[1], boxes, copies=random.random() < 0.5)
                target.append((specs[1], boxes, fragment, held))
            if random.random() < 0.5:
                source = kept_on_host(source)
            redistribute(job, source, [item[2] for item in target], limit=limit)
            for spec, boxes, _, held in target:
                assert_filled(spec, boxes, held, seed)
            assert heard.most <= max(limit // 2, 2 * 16 * job.world_size)
            heard.most = 0


def hold_a_bound(limit: int) -> None:
    """All ranks want all of a large tensor from one, and many small ones that lie cut."""
    with overheard() as (job, heard):
        large = Spec("large", "master", (300, 40), torch.float32)
        small = [Spec(f"small{n}", "master", (30, 20), torch.float32) for n in range(30)]
        boxes = list(interval_boxes(large.shape, 0, 300 * 40))
        source = [filled(large, boxes if job.rank == 0 else [])]
        target = [fragment_of(large, boxes)]
        out = [0, 0]
        for spec in small:
            source.append(filled(spec, intervals(spec.shape, job.world_size, Random(1))[job.rank]))
            fragment, held = fragment_of(spec, list(interval_boxes(spec.shape, 0, 600)))
            held.out = out
            target.append((fragment, held))
        redistribute(job, source, [fragment for fragment, _ in target], limit=limit)
        for spec, (fragment, held) in zip([large, *small], target, strict=True):
            assert_filled(spec, fragment.boxes, held, "bound")
        assert 0 < heard.most <= limit // 2
        assert out[1] <= max(limit // 2, 600 * 4)


def keep_what_is_here() -> int:
    """The new layout needs on each rank only what is there."""
    with overheard() as (job, heard):
        spec = Spec("matrix", "exp_avg", (6, 4), torch.float32)
        old = [list(interval_boxes(spec.shape, 0, 14)), list(interval_boxes(spec.shape, 9, 24))]
        new = [list(interval_boxes(spec.shape, 0, 10)), list(interval_boxes(spec.shape, 10, 24))]
        fragment, held = fragment_of(spec, new[job.rank])
        before = heard.count
        redistribute(job, [filled(spec, old[job.rank])], [fragment])
        assert_filled(spec, fragment.boxes, held, "local")
        return heard.count - before


def take_from_the_nearest() -> list[float]:
    """Ranks 0, 2 and 3 have copies, told apart by their values; all want one."""
    with Job.open(plan()) as job:
        spec = Spec("bias", "exp_avg", (2,), torch.float32)
        boxes = list(interval_boxes(spec.shape, 0, 2))
        source = filled(spec, boxes)
        source.write(source.read() * 0 + job.rank)
        fragment, held = fragment_of(spec, boxes)
        redistribute(job, [] if job.rank == 1 else [source], [fragment])
        values: list[float] = held.flat.tolist()
        return values


def start_afresh() -> None:
    with Job.open(plan()) as job:
        spec = Spec("bias", "exp_avg", (5,), torch.float32)
        boxes = list(interval_boxes(spec.shape, 0, 5))
        fresh, held = fragment_of(spec, boxes)
        own = replace(spec, name="bucket/b0", kind="error")
        other, other_held = fragment_of(own, boxes)
        had = replace(filled(own, boxes), on_reshape="reset")
        targets = [replace(fresh, initial=3.0), replace(other, on_reshape="reset", initial=1.0)]
        redistribute(job, [had], targets)
        assert held.flat.tolist() == [3.0] * 5
        assert other_held.flat.tolist() == [1.0] * 5


def want_too_much(case: str) -> str:
    with Job.open(plan()) as job:
        spec = Spec("layer.weight", "master", (4, 3), torch.float32)
        everything = list(interval_boxes(spec.shape, 0, 12))
        part = everything if case != "hole" else list(interval_boxes(spec.shape, 0, 7))
        had = {
            "absent": replace(spec, name="other"),
            "shape": replace(spec, shape=(12,)),
            "complex": replace(spec, dtype=torch.complex64),
        }.get(case, spec)
        part = list(interval_boxes(had.shape, 0, 12)) if case == "shape" else part
        fragment, held = fragment_of(spec, everything if job.rank == 1 else [])
        with pytest.raises(TrainingError) as refused:
            redistribute(job, [filled(had, part)] if job.rank == 0 else [], [fragment])
        assert torch.equal(held.flat, torch.full_like(held.flat, 121)), "nothing is overwritten"
        return str(refused.value)


# -- claims ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_layout_becomes_any_other(world: int) -> None:
    run_distributed(move_at_random, world, 12)


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_layout_becomes_any_other_for_many(world: int) -> None:
    run_distributed(move_at_random, world, 300)


@pytest.mark.parametrize("limit", [4096, 32768])
def test_no_more_than_the_limit_is_staged(limit: int) -> None:
    run_distributed(hold_a_bound, 3, limit)


def test_what_a_rank_has_does_not_travel() -> None:
    assert run_distributed(keep_what_is_here, 2) == [1, 1], "ranks agree that nothing travels"


def test_of_several_copies_a_rank_takes_its_own_or_the_nearest() -> None:
    assert run_distributed(take_from_the_nearest, 4) == [[0, 0], [0, 0], [2, 2], [3, 3]]


def test_states_that_no_rank_has_and_those_of_a_layout_start_afresh() -> None:
    run_distributed(start_afresh, 2)


MESSAGES: dict[str, str] = {
    "absent": "rank 1: no rank has layer.weight (master)",
    "hole": "no rank has elements [2, 1] to [3, 3] of layer.weight (master)",
    "shape": "layer.weight (master) has shape [12] in the old layout, and [4, 3] in the new one",
    "complex": "layer.weight (master) is complex in the old layout, but torch.float32 in the new",
}


@pytest.mark.parametrize("case", MESSAGES)
def test_what_no_rank_can_give_is_named_on_every_rank(case: str) -> None:
    for message in run_distributed(want_too_much, 2, case):
        assert MESSAGES[case] in message


def test_a_tensor_may_be_of_any_dtype() -> None:
    run_distributed(move_one_of_each_dtype, 2)


def move_one_of_each_dtype() -> None:
    from drivetrain.checkpoint.exchange import DTYPES as KNOWN

    with Job.open(plan()) as job:
        for dtype in KNOWN:
            spec = Spec("bias", "exp_avg", (9,), dtype)
            boxes = list(interval_boxes(spec.shape, 0, 9))
            source = Held((torch.arange(9) % 2).to(dtype))
            mine = replace(fragment_of(spec, boxes)[0], read=source.read)
            fragment, held = fragment_of(spec, boxes)
            redistribute(job, [mine] if job.rank else [], [] if job.rank else [fragment])
            if job.rank == 0:
                assert torch.equal(held.flat.to(torch.complex128), source.flat.to(torch.complex128))


def rebuild_with_states_cut_over_ranks() -> None:
    registry = Registry(core_entries()).with_plugins(ShardedStates)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "plugins": {"sharded_states": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.0}},
    }
    engine, *_ = initialize(model=network(), config=config, registry=registry)
    plain = network()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.0)
    for step in range(3):
        x = torch.randn(2, 5, generator=torch.Generator().manual_seed(step))  # on all ranks
        engine.backward(engine(x).square().mean())
        engine.step()
        plain(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:  # which moves the ends of what each rank keeps
            engine.module[2].requires_grad_(False)
            engine.rebuild()
            plain[2].requires_grad_(False)
    names = dict(plain.named_parameters())
    moments = [f for f in engine.states.fragments() if f.kind.startswith("exp_avg")]
    assert moments
    for fragment in moments:
        whole = optimizer.state[names[fragment.name]][fragment.kind]
        for box in fragment.boxes:
            found = box.of_storage(fragment.read())
            torch.testing.assert_close(found, box.of(whole), rtol=1e-5, atol=1e-7)
    engine.destroy()
    engine.job.close()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 2))


def test_states_cut_over_ranks_outlive_a_rebuild() -> None:
    run_distributed(rebuild_with_states_cut_over_ranks, 2)
