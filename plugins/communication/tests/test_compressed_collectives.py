"""Compressed collectives: their numbers, bytes and errors against plain references."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import Purpose, Tag
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed

NUMEL, ROUNDS = 1000, 5
GRADIENT = Tag(Purpose.GRADIENT, "bucket", "test")


def job_with(**compress: Any) -> Job:
    config = {"train_micro_batch_size_per_gpu": 1, "communication": {"compress": compress}}
    return Job.open(Plan.build(config, world_size=Ranks.current().world_size))


def values(rank: int, turn: int = 0, numel: int = NUMEL) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * turn + rank)
    return torch.randn(numel, generator=generator)


# -- functions that run on every rank ---------------------------------------------------------


def sums(how: dict[str, Any], kind: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], Any]:
    """Several sums of other values each, and what they sent."""
    with job_with(gradients={"minimum_bytes": 0, **how}) as job:
        results, log = [], job.byte_log
        for turn in range(ROUNDS):
            log.reset()
            own = values(job.rank, turn).to(dtype)
            if kind == "all_reduce":
                handle = job.communicator.all_reduce(own, "data", GRADIENT, asynchronous=True)
                handle.wait()
                results.append(own.float())
            else:
                size = job.world_size
                part = own.new_empty(NUMEL // size)
                job.communicator.reduce_scatter(part, own[: NUMEL // size * size], "data", GRADIENT)
                results.append(part.float())
        return results, log.total(Purpose.GRADIENT).sent_bytes


def all_sums(cases: list[tuple[Any, ...]]) -> list[Any]:
    return [sums(*case) for case in cases]


def moves(format: str) -> dict[str, Any]:
    """A gather of weights, exchanges of activations and of experts' tokens."""
    how = {"method": format, "minimum_bytes": 0}
    with job_with(weights=how, activations=how, experts=how) as job:
        rank, size, comm = job.rank, job.world_size, job.communicator
        whole = torch.empty(size * NUMEL)
        comm.all_gather(whole, values(rank), "data", Tag(Purpose.WEIGHT, "w"), settled=True)
        even = torch.empty(size, 50)
        tag = Tag(Purpose.ACTIVATION, "a")
        comm.all_to_all(even, values(rank, 1, size * 50).view(size, 50), "data", tag)
        # Rank r sends r + i rows to rank i; one of them sends none to itself.
        rows = [rank + i for i in range(size)]
        came = torch.empty(sum(i + rank for i in range(size)), 7)
        tag = Tag(Purpose.ACTIVATION, "layer", "experts")
        own = values(rank, 2, sum(rows) * 7).view(-1, 7)
        splits = {"output_splits": [i + rank for i in range(size)], "input_splits": rows}
        comm.all_to_all(came, own, "data", tag, **splits)
        settled = comm.reads_settled(whole, "data")
        joined = comm.joined_buffer(1 << 16, torch.float32, "data"), comm.joined_page("data")
        return {"whole": whole, "even": even, "came": came, "read": (settled, *joined)}


def all_moves(formats: list[str]) -> list[dict[str, Any]]:
    return [moves(name) for name in formats]


def left_alone() -> list[torch.Tensor]:
    """Other purposes, maxima, integers and small tensors are not compressed."""
    from drivetrain.contracts import Op

    with job_with(gradients={"method": "int4", "minimum_bytes": 256}) as job:
        comm, rank = job.communicator, job.rank
        state, most, small = values(rank), values(rank), values(rank, numel=10)
        comm.all_reduce(state, "data", Tag(Purpose.STATE, "s"))
        comm.all_reduce(most, "data", GRADIENT, op=Op.MAX)
        comm.all_reduce(small, "data", GRADIENT)
        return [state, most, small]


def overflow(how: dict[str, Any]) -> list[bool]:
    """An infinity arrives as something that is not finite, and does not spoil what follows."""
    with job_with(gradients={"minimum_bytes": 0, **how}) as job:
        first, second = values(job.rank), values(job.rank)
        if job.rank == 0:
            first[3] = float("inf")
        for tensor in (first, second):
            job.communicator.all_reduce(tensor, "data", GRADIENT)
        return [bool(torch.isfinite(first).all()), bool(torch.isfinite(second).all())]


def all_overflows(methods: list[str]) -> list[list[bool]]:
    return [overflow({"method": method, "error_feedback": True}) for method in methods]


# -- references -------------------------------------------------------------------------------

STEPS = {"int8": 127, "int4": 7}


def rounded(rows: np.ndarray, format: str, block: int = 256) -> np.ndarray:
    """Each row's blocks on their grid of codes; fp8 is torch's cast."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % block)))
    grid = padded.reshape(len(rows), -1, block)
    extent = np.abs(grid).max(axis=2, keepdims=True)
    if format in STEPS:
        scale = np.where(extent > 0, extent / STEPS[format], 1)
        found = np.round(grid / scale) * scale
    else:
        kind = torch.float8_e4m3fn if format == "fp8_e4m3" else torch.float8_e5m2
        scale = np.where(extent > 0, extent / torch.finfo(kind).max, 1)
        codes = torch.from_numpy((grid / scale).astype(np.float32)).to(kind).float()
        found = codes.numpy() * scale
    return found.reshape(len(rows), -1)[:, : rows.shape[1]]


def all_reduced(world: int, format: str, *, feedback: bool) -> list[np.ndarray]:
    chunk = math.ceil(NUMEL / world / 256) * 256
    worker = np.zeros((world, world, chunk))
    server, results = np.zeros((world, chunk)), []
    for turn in range(ROUNDS):
        own = np.stack([values(rank, turn).double().numpy() for rank in range(world)])
        rows = np.pad(own, ((0, 0), (0, world * chunk - NUMEL))).reshape(world, world, chunk)
        wanted = rows + worker
        sent = np.stack([rounded(each, format) for each in wanted])
        total = sent.sum(axis=0) + server
        answer = rounded(total, format)
        if feedback:
            worker, server = wanted - sent, total - answer
        results.append(answer.reshape(-1)[:NUMEL])
    return results


# -- claims -----------------------------------------------------------------------------------

BLOCKS = ["int8", "int4", "fp8_e4m3", "fp8_e5m2"]
METHODS = [*BLOCKS, "powersgd", "top_k"]
GRIDS = [(name, feedback) for name in BLOCKS for feedback in (False, True)]
CASES: dict[tuple[str, ...], tuple[Any, ...]] = {
    **{
        ("grid", name, str(feedback)): (
            {"method": name, "error_feedback": feedback},
            "all_reduce",
            torch.float32,
        )
        for name, feedback in GRIDS
    },
    **{("scatter", name): ({"method": name}, "reduce_scatter", torch.bfloat16) for name in BLOCKS},
    **{
        ("long", name): (
            {"method": name, "error_feedback": True, "density": 0.2},
            "all_reduce",
            torch.float32,
        )
        for name in METHODS
    },
}


@cache
def of_all_ranks(world: int) -> dict[tuple[str, ...], list[Any]]:
    """What each rank brings in each case; the ranks start once for all of them."""
    cases = {key: case for key, case in CASES.items() if world == 2 or key[0] == "grid"}
    ranks = run_distributed(all_sums, world, list(cases.values()))
    return dict(zip(cases, zip(*ranks, strict=True), strict=True))


@cache
def moved(world: int) -> list[list[dict[str, Any]]]:
    return run_distributed(all_moves, world, BLOCKS)


@cache
def overflowed() -> list[list[list[bool]]]:
    return run_distributed(all_overflows, 2, METHODS)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("format", "feedback"), GRIDS)
def test_a_quantised_all_reduce_is_that_of_the_grids(
    world: int, format: str, feedback: bool
) -> None:
    expected = all_reduced(world, format, feedback=feedback)
    answers = of_all_ranks(world)["grid", format, str(feedback)]
    step = np.abs(expected[0]).max() / {"int4": 7, "fp8_e5m2": 4}.get(format, 16)
    for results, _ in answers:
        for mine, first, reference in zip(results, answers[0][0], expected, strict=True):
            assert torch.equal(mine, first)  # all ranks have the same bits
            off = np.abs(mine.double().numpy() - reference)
            # Numbers on the border between two codes may fall on either side.
            assert (off > 1e-4).mean() < 0.02
            assert off.max() < 2 * step


@pytest.mark.parametrize("format", BLOCKS)
def test_a_reduce_scatter_sends_half_of_an_all_reduce_and_keeps_a_slice(format: str) -> None:
    world = 2
    for rank, (results, sent) in enumerate(of_all_ranks(world)["scatter", format]):
        own = slice(rank * NUMEL // world, (rank + 1) * NUMEL // world)
        for turn, mine in enumerate(results):
            exact = sum(values(r, turn).bfloat16().double() for r in range(world))[own]
            step = exact.abs().max() / {"int4": 5, "fp8_e5m2": 4}.get(format, 12)
            assert (mine - exact).abs().max() < step
        blocks = 2  # of 500 elements in 256
        codes = blocks * 256 // (2 if format == "int4" else 1)
        assert sent == 4 * blocks + codes


@pytest.mark.parametrize("method", METHODS)
def test_with_feedback_nothing_is_lost_in_the_long_run(method: str) -> None:
    """The mean of what was sent comes near the mean of what was meant, which no single sum does."""
    results, _ = of_all_ranks(2)["long", method][0]
    exact = [sum(values(rank, turn) for rank in range(2)) for turn in range(ROUNDS)]
    errors = [(a - b).norm() for a, b in zip(results, exact, strict=True)]
    together = (sum(results) - sum(exact)).norm()
    if method == "powersgd":  # without a matrix in the bucket everything travels
        assert together < 1e-4
    else:
        assert together < 0.8 * sum(errors)


@pytest.mark.parametrize("format", BLOCKS)
def test_gathers_and_exchanges_bring_the_rounded_numbers(format: str) -> None:
    world = 3
    answers = [rank[BLOCKS.index(format)] for rank in moved(world)]
    tolerance = {"int8": 0.02, "int4": 0.3, "fp8_e4m3": 0.15, "fp8_e5m2": 0.3}[format]
    for rank, found in enumerate(answers):
        assert torch.equal(found["whole"], answers[0]["whole"])
        exact = torch.cat([values(r) for r in range(world)])
        assert (found["whole"] - exact).abs().max() < 2 * tolerance
        exact = torch.stack([values(r, 1, world * 50).view(world, 50)[rank] for r in range(world)])
        assert (found["even"] - exact).abs().max() < 2 * tolerance
        rows = []
        for source in range(world):
            sent = values(source, 2, 7 * sum(source + i for i in range(world))).view(-1, 7)
            begin = sum(source + i for i in range(rank))
            rows.append(sent[begin : begin + source + rank])
        assert (found["came"] - torch.cat(rows)).abs().max() < 2 * tolerance
        assert found["read"] == (False, None, 0)  # nothing is read past the messages


def test_what_is_no_sum_of_gradients_travels_as_it_is() -> None:
    state, most, small = run_distributed(left_alone, 2)[0]
    assert torch.equal(state, values(0) + values(1))
    assert torch.equal(most, torch.maximum(values(0), values(1)))
    assert torch.equal(small, values(0, numel=10) + values(1, numel=10))


@pytest.mark.parametrize("method", METHODS)
def test_an_overflow_is_seen_by_all_ranks_and_not_fed_back(method: str) -> None:
    assert [rank[METHODS.index(method)] for rank in overflowed()] == [[False, True]] * 2


@pytest.mark.parametrize(("format", "bits"), [("int8", 8), ("int4", 4), ("fp8_e5m2", 8)])
def test_bytes_are_codes_and_a_scale_for_each_block(format: str, bits: int) -> None:
    _, sent = of_all_ranks(2)["grid", format, "False"][0]
    chunk = 512  # half of 1000, in whole blocks of 256
    assert sent == 2 * (chunk * bits // 8 + 4 * chunk // 256)  # one message of each of two hops
