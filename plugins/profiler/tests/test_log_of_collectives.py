"""The log has each collective that a job issued, once, whether it is waited for or overlaps."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from drivetrain_profiler import (
    configure,
    get_comm_operation_count,
    has_comm_data,
    log_summary,
    reset_log,
)
from drivetrain_profiler.log import Key, Record, rates

from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed

TAG = Tag(Purpose.CONTROL, site="a test")


def opened(section: dict[str, Any]) -> Job:
    config = {"train_micro_batch_size_per_gpu": 1, "comms_logger": section}
    return Job.open(Plan.build(config, world_size=2))


def logged(section: dict[str, Any]) -> dict[str, Any]:
    job = opened(section)
    reset_log()
    assert not has_comm_data()
    c, rank = job.communicator, job.rank
    for _ in range(3):
        c.all_reduce(torch.ones(256), "data", TAG)
    handle = c.all_gather(torch.empty(8), torch.ones(4), "data", TAG, asynchronous=True)
    handle.wait()
    handle.wait()
    if rank == 0:
        c.send(torch.ones(2), "data", TAG, to=1)
    else:
        c.receive(torch.empty(2), "data", TAG, source=0)
    found = log_summary(show_straggler=True, return_dict=True)
    assert found is not None
    found["counts"] = get_comm_operation_count(), get_comm_operation_count("all_reduce")
    job.close()
    return found


@pytest.mark.parametrize("synchronized", [True, False])
def test_operations_are_counted_by_size_and_axis(synchronized: bool) -> None:
    for found in run_distributed(logged, 2, {"synchronized": synchronized}):
        rows = {
            op: {k: row["count"] for k, row in rows.items()}
            for op, rows in found["summary"].items()
        }
        assert rows == {
            "all_reduce": {"all_reduce 1024 data": 3},
            "all_gather": {"all_gather 32 data": 1},
            "send_receive": {"send_receive 8 data": 1},
        }
        assert found["counts"] == (5, 3)
        late = found["straggler_analysis"]
        assert set(late) == {"all_reduce 1024 data", "all_gather 32 data", "send_receive 8 data"}
        assert all(min(values) == 0 and len(values) == 2 for values in late.values())


def test_chosen_operations_and_places() -> None:
    section = {"prof_all": False, "prof_ops": ["all_gather_into_tensor"], "debug": True}
    for found in run_distributed(logged, 2, section):
        assert list(found["summary"]) == ["all_gather"]
        assert list(found["summary"]["all_gather"]) == ["all_gather 32 data control/a test"]


def changed() -> tuple[list[int], list[str]]:
    job, counts, said = opened({}), [], []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("drivetrain.comms").addHandler(handler)
    logging.getLogger("drivetrain.comms").setLevel(logging.INFO)
    for change in (
        {"enabled": False},
        {"prof_ops": ["barrier"]},
        {"prof_all": True, "verbose": True},
    ):
        configure(**change)
        reset_log()
        job.communicator.all_reduce(torch.ones(4), "data", TAG)
        counts.append(get_comm_operation_count())
    job.close()
    return counts, said


def test_scripts_may_change_what_is_logged() -> None:
    for counts, said in run_distributed(changed, 2):
        assert counts == [0, 0, 1]
        assert len(said) == 1
        assert said[0].startswith("all_reduce 16 data: ")


def test_without_a_log_scripts_are_told_what_to_write() -> None:
    assert not has_comm_data()
    configure(enabled=False)
    with pytest.raises(TrainingError, match='write "comms_logger": '):
        log_summary()


def test_rates_are_those_of_nccl_tests() -> None:
    assert rates(Key("all_reduce", 10**9, "data"), 4, 2.0) == pytest.approx((4.0, 6.0))
    assert rates(Key("all_gather", 10**9, "data"), 4, 2.0) == pytest.approx((4.0, 3.0))
    assert rates(Key("broadcast", 10**9, "data"), 4, 2.0) == pytest.approx((4.0, 4.0))


def test_a_long_run_keeps_the_latest_times_and_counts_all() -> None:
    record = Record(2)
    for seconds in [1.0] * 8 + [0.0, 100.0]:
        record.add(seconds)
    assert record.mean() == 1.0  # without the shortest and the longest tenth
    for _ in range(100_000):
        record.add(2.0)
    assert (record.count, record.total, record.mean()) == (100_010, 200_108.0, 2.0)
    assert len(record.latest) == 1000
