"""Collectives in two levels bring what those of one hop bring, and cross hosts less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain_communication.routes.hierarchy import Hierarchical, find_levels

from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import (
    Collective,
    Communicator,
    CommunicatorWrapper,
    Handle,
    Kind,
    Op,
    Purpose,
    SubAxis,
    Tag,
)
from drivetrain.errors import ConfigError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed

TAG = Tag(Purpose.GRADIENT, "k")
HOSTS = {"blocks": [0, 0, 1, 1], "turns": [0, 1, 0, 1]}


class Recorder(CommunicatorWrapper):
    """Notes which ranks take part in what."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.seen: list[tuple[str, int]] = []

    def run(self, collective: Collective) -> Handle:
        self.seen.append((str(collective.kind), self.size(collective.axis)))
        return super().run(collective)


def open_job(**routes: Any) -> Job:
    config = {"train_micro_batch_size_per_gpu": 1, "communication": {"routes": routes}}
    return Job.open(Plan.build(config, world_size=Ranks.current().world_size))


def values(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-50, 50, (numel,), generator=generator).to(dtype)


def collectives(layout: str) -> list[Any]:
    with open_job(hierarchical=False) as job:
        recorder = Recorder(job.communicator)
        comm = Hierarchical(recorder, job.mesh.ranks, HOSTS[layout], 0)
        found: list[Any] = []
        for numel in (1, 2, 3, 8, 1001):
            for dtype in (torch.float32, torch.int64):
                for op in (Op.SUM, Op.MAX):
                    tensor = values(job.rank, numel, dtype)
                    comm.all_reduce(tensor, "world", TAG, op=op, asynchronous=True).wait()
                    found.append(tensor)
        recorder.seen.clear()
        tensor = values(job.rank, 8, torch.float32)
        comm.all_reduce(tensor, "world", TAG)
        rows = values(job.rank, 24, torch.float32).view(4, 2, 3)
        came = torch.empty_like(rows)
        comm.all_to_all(came, rows, "world", TAG, asynchronous=True).wait()
        return [found, came, recorder.seen]


def through_the_config(minimum: int) -> torch.Tensor:
    with open_job(ranks_per_host=2, minimum_bytes=minimum) as job:
        tensor = values(job.rank, 100, torch.float32)
        job.communicator.all_reduce(tensor, "data", TAG)
        return tensor


@pytest.mark.parametrize("layout", HOSTS)
def test_two_levels_bring_the_numbers_of_one_hop(layout: str) -> None:
    answers = run_distributed(collectives, 4, layout)
    for rank, (found, came, seen) in enumerate(answers):
        results = iter(found)
        for numel in (1, 2, 3, 8, 1001):
            for dtype in (torch.float32, torch.int64):
                every = torch.stack([values(r, numel, dtype) for r in range(4)])
                assert torch.equal(next(results), every.sum(0))
                assert torch.equal(next(results), every.amax(0))
        sent = [values(r, 24, torch.float32).view(4, 2, 3)[rank] for r in range(4)]
        assert torch.equal(came, torch.stack(sent))
        # No hop has all four ranks: two share a host, two are of the same place.
        hops = [Kind.REDUCE_SCATTER, Kind.ALL_REDUCE, Kind.ALL_GATHER, *[Kind.ALL_TO_ALL] * 2]
        assert seen == [(str(kind), 2) for kind in hops]


@pytest.mark.parametrize("minimum", [0, 1 << 20])
def test_the_section_switches_it_on(minimum: int) -> None:
    expected = torch.stack([values(r, 100, torch.float32) for r in range(4)]).sum(0)
    for tensor in run_distributed(through_the_config, 4, minimum):
        assert torch.equal(tensor, expected)


def test_one_hop_it_is_where_two_would_be_no_better() -> None:
    assert find_levels("data", [0, 0, 0, 0], 1) is None  # one host
    assert find_levels("data", [0, 1, 2, 3], 1) is None  # a rank each
    assert find_levels("data", [0, 0, 1], 1) is None  # uneven
    assert find_levels("data", [0, 1, 1, 0], 1) is None  # places in another order
    assert find_levels(SubAxis("pp", (0, 3)), [0, 1], 0) is None
    levels = find_levels("data", [5, 5, 9, 9], 2)
    assert levels is not None
    assert levels.inside == SubAxis("data", (2, 3))
    assert levels.across == SubAxis("data", (0, 2))


def test_hosts_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="ranks_per_host: is 3, which does not divide the 4"):
        Plan.build(
            {"train_batch_size": 4, "communication": {"routes": {"ranks_per_host": 3}}},
            world_size=4,
        )
