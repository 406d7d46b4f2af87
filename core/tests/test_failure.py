"""How an error on one rank, or its death, ends all of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch.distributed as dist
from bare_jobs import plan, total

from drivetrain.communication import failure
from drivetrain.errors import CommunicationError
from drivetrain.job.job import Job
from drivetrain.testing import RanksFailedError, run_distributed


def fails(culprit: int, place: str) -> None:
    job = Job.open(plan(sequence_parallel_size=2))
    total(job)
    if job.rank == culprit:
        if place == "context":
            with job:
                raise ValueError("no more data")
        raise ValueError("no more data")
    # Not all of these wait for the culprit themselves; the others' ends must reach them.
    total(job, "sp")
    total(job, "dp")
    total(job)


@pytest.mark.parametrize("culprit", [0, 1, 3])
@pytest.mark.parametrize("place", ["script", "context"])
def test_ranks_that_wait_fail_with_the_error_of_the_one_that_raised(culprit, place):
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(fails, 4, culprit, place)
    errors = caught.value.errors
    assert errors.pop(culprit).error == "ValueError: no more data"
    assert len(errors) == 3
    for error in errors.values():
        assert re.match(
            "CommunicationError: (all_reduce of control/test over|creating process group) .* was "
            f"broken off because rank {culprit} failed: ValueError: no more data$",
            error.error,
        ), error.error


def fails_but_lives_on(folder: Path) -> None:
    job = Job.open(plan())
    total(job)
    if job.rank == 1:
        with suppress(ValueError), job:
            raise ValueError("no more data")
        while len(list(folder.iterdir())) < 2:
            time.sleep(0.02)
        raise RuntimeError("the end of the process")
    try:
        total(job)
    finally:
        (folder / f"rank {job.rank} has ended").touch()


def test_ranks_that_wait_need_not_wait_for_the_end_of_the_process(tmp_path: Path):
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(fails_but_lives_on, 3, tmp_path)
    *others, last = caught.value.errors.values()
    assert last.error == "RuntimeError: the end of the process"
    for error in others:
        assert error.error.endswith("because rank 1 failed: ValueError: no more data")


def dies(culprit: int) -> list[str]:
    job = Job.open(plan(sequence_parallel_size=2))
    total(job)
    if job.rank == culprit:
        os.kill(os.getpid(), signal.SIGKILL)
    messages = []
    ranks = job.mesh.ranks("sp")
    for axis in ("sp", "world") if culprit in ranks else ("world",):
        with pytest.raises(CommunicationError) as caught:
            total(job, axis)
        messages.append(str(caught.value))
    raise RuntimeError(json.dumps(messages))


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_is_killed_is_named_on_every_other(culprit):
    """By gloo, which says no more than that a connection has closed; also where a rank waits for it
    with no connection yet."""
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(dies, 4, culprit)
    errors = caught.value.errors
    assert "signal SIGKILL" in errors.pop(culprit).error
    assert len(errors) == 3
    for rank, error in errors.items():
        messages = json.loads(error.error.removeprefix("RuntimeError: "))
        assert len(messages) == (2 if rank // 2 == culprit // 2 else 1)
        for message in messages:
            assert re.match(
                "(all_reduce of control/test|creating process group|waiting for a collective).* "
                f"was broken off because rank {culprit} died without an error of its own",
                message,
            ), message


def leaves_early() -> None:
    with Job.open(plan()) as job:
        total(job)
        if job.rank == 1:
            return
        total(job)


def test_a_rank_that_left_is_not_called_dead():
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(leaves_early, 3)
    assert set(caught.value.errors) == {0, 2}
    first, second = (caught.value.errors[rank].error for rank in caught.value.errors)
    assert first.startswith("CommunicationError: all_reduce of control/test over 'world' (3 ranks)")
    assert first.endswith("; rank 1 had closed the job before")
    assert "died" not in first + second


def closes_first(folder: str, patience: float, raises: bool) -> bool:
    """On rank 1, whether rank 0 was about to close when rank 1's close was through."""
    failure._PARTING_SECONDS = patience
    about, closed = Path(folder, "about"), Path(folder, "closed")
    job = Job.open(plan())
    total(job)
    if job.rank == 1:
        try:
            if raises:
                raise ValueError
            job.close()
        except ValueError:
            job.close()
        closed.touch()
        return about.exists()
    while patience < 1 and not closed.exists():
        time.sleep(0.02)
    time.sleep(0.5)
    about.touch()
    job.close()
    return True


def test_a_rank_closes_its_job_when_the_others_do(tmp_path: Path):
    assert run_distributed(closes_first, 2, str(tmp_path), 60.0, False) == [True, True]


def test_a_rank_waits_for_others_to_close_but_not_for_long(tmp_path: Path):
    assert run_distributed(closes_first, 2, str(tmp_path), 0.1, False) == [True, False]


def test_a_rank_that_closes_its_job_for_an_error_waits_for_nobody(tmp_path: Path):
    started = time.monotonic()
    run_distributed(closes_first, 2, str(tmp_path), 300.0, True)
    assert time.monotonic() - started < 200


def all_finish(raise_on: int) -> str:
    with Job.open(plan()) as job:
        total(job)
        try:
            if job.rank == raise_on:
                raise SystemExit(0)
        except SystemExit:
            return "left"
    return "ended"


def test_leaving_with_exit_code_zero_is_no_failure():
    assert run_distributed(all_finish, 2, 1) == ["ended", "left"]


SCRIPT = """
import sys, time
sys.path[:] = {path!r}
import torch
from drivetrain.communication import failure
from {module} import Job, plan, total
failure._FAREWELL_SECONDS = 60  # a busy host may need more than there is
job = Job.open(plan())
total(job)
if job.rank == {culprit}:
    raise ValueError("no more data")
time.sleep(2)  # busy with something else when it happens
total(job)
"""


@pytest.mark.parametrize("culprit", [0, 1])
def test_scripts_end_alike_when_rank_0_hosts_the_store(culprit):
    """Without an agent, the store lives in rank 0, which must not go before the others know."""
    path = [str(Path(__file__).parent), *sys.path]
    script = SCRIPT.format(path=path, module=Path(__file__).stem, culprit=culprit)
    probe = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = probe.port
    del probe
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "3",
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(3)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1, 1], "\n".join(errors)
    assert "ValueError: no more data" in errors.pop(culprit)
    for error in errors:
        assert f"because rank {culprit} failed: ValueError: no more data" in error
