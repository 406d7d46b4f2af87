"""Ranks that wait on a device for one that has failed are freed, and fail with its error.

An event stands in for the device: a rank waits for it as it would for a kernel of NCCL, which
ends only when it is aborted.
"""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from drivetrain_kernels.gpu import watch as module
from drivetrain_kernels.gpu.watch import Watch, abort_collectives, watch

from drivetrain.communication.failure import Failure
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import RanksFailedError, run_distributed


class Board:
    failure = None

    def first(self):
        return self.failure


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "INTERVAL_SECONDS", 0.01)


def watching(board, rank=0):
    aborted = threading.Event()
    return Watch(board, rank, aborted.set), aborted


def test_the_failure_of_another_rank_aborts():
    board = Board()
    made, aborted = watching(board)
    assert not aborted.wait(0.1)
    board.failure = Failure(1, "ValueError: no more data")
    assert aborted.wait(60)
    made.close()


def test_a_rank_that_fails_aborts_when_it_closes_and_not_before():
    board = Board()
    board.failure = Failure(0, "ValueError: no more data")
    made, aborted = watching(board, rank=0)
    assert not aborted.wait(0.1)
    made.close()
    assert aborted.is_set()


def test_a_job_that_ends_well_aborts_nothing():
    made, aborted = watching(Board())
    made.close()
    assert not aborted.is_set()
    assert not made._thread.is_alive()


def test_nothing_is_aborted_twice():
    board, calls = Board(), []
    board.failure = Failure(1, "ValueError: no more data")
    made = Watch(board, 0, lambda: calls.append(1))
    made._thread.join(60)
    made.close()
    assert calls == [1]


def test_communicators_are_aborted_together(monkeypatch):
    said = []
    backend = SimpleNamespace(
        _group_start=lambda: said.append("start"), _group_end=lambda: said.append("end")
    )
    world = SimpleNamespace(_get_backend=lambda device: backend)
    groups = [SimpleNamespace(abort=lambda name=name: said.append(name)) for name in ("a", "b")]
    state = SimpleNamespace(
        GroupMember=SimpleNamespace(WORLD=world), _world=SimpleNamespace(pg_names=groups)
    )
    monkeypatch.setattr(module, "c10d", state)
    abort_collectives("cuda")
    assert said == ["start", "a", "b", "end"]


def waits() -> None:
    """Rank 1 raises; rank 0 waits on its device for it."""
    freed = threading.Event()
    module.abort_collectives = lambda device_type: freed.set()
    job = Job.open(Plan.build({"accelerator": "cpu"}, batch_required=False))
    watch(job)
    if job.rank == 1:
        time.sleep(0.2)
        raise ValueError("no more data")
    assert freed.wait(120), "nobody aborted"
    raise job.explain("all_reduce of gradients", RuntimeError("NCCL communicator was aborted"))


def test_a_rank_that_waits_fails_with_the_error_of_the_one_that_raised():
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(waits, 2)
    assert caught.value.errors[0].error.endswith("because rank 1 failed: ValueError: no more data")


def closes_in_turn() -> bool:
    aborted = []
    module.abort_collectives = lambda device_type: aborted.append(device_type)
    with Job.open(Plan.build({"accelerator": "cpu"}, batch_required=False)) as job:
        watch(job)
        job.communicator.barrier("world", _tag())
    return not aborted


def _tag():
    from drivetrain.contracts import Purpose, Tag

    return Tag(Purpose.CONTROL)


def test_jobs_of_two_ranks_that_end_well_abort_nothing():
    assert run_distributed(closes_in_turn, 2) == [True, True]


def test_a_job_of_one_rank_is_not_watched():
    with Job.open(Plan.build({"accelerator": "cpu"}, batch_required=False, world_size=1)) as job:
        before = set(threading.enumerate())
        watch(job)
        assert set(threading.enumerate()) <= before
        assert job.device == torch.device("cpu")
