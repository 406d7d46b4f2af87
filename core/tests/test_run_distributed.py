"""The runner itself: results, errors of every rank, time-outs, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from drivetrain.contracts import Purpose, Tag
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import RanksFailedError, run_distributed


def place(word: str) -> tuple[int, int, str, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), word, torch.get_num_threads()


def test_results_come_back_by_rank():
    assert run_distributed(place, 3, "a") == [(rank, 3, "a", 1) for rank in range(3)]


def sum_of_ranks(dtype: torch.dtype) -> torch.Tensor:
    dist.init_process_group("gloo")
    x = torch.tensor([dist.get_rank() + 1], dtype=dtype)
    dist.all_reduce(x)
    return x


def test_tensors_travel_and_worlds_of_any_size_follow_each_other():
    for world in (2, 4, 1, 3):
        results = run_distributed(sum_of_ranks, world, torch.float64)
        assert [result.item() for result in results] == [world * (world + 1) / 2] * world


def pid() -> int:
    return os.getpid()


def test_processes_are_used_again():
    assert set(run_distributed(pid, 2)) == set(run_distributed(pid, 2))


def untidy() -> tuple[object, ...]:
    before = (
        dist.is_initialized(),
        os.environ.get("LEFT_BEHIND"),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.initial_seed(),
        Path.cwd().name,
    )
    dist.init_process_group("gloo")
    os.environ["LEFT_BEHIND"] = "1"
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.manual_seed(12345)
    os.chdir("/")
    return before


def test_a_call_finds_nothing_of_the_one_before():
    assert run_distributed(untidy, 2) == run_distributed(untidy, 2)


left_open: list[Job] = []


def leaves_a_job_open(culprit: int | None) -> None:
    job = Job.open(Plan.build({}, world_size=2, batch_required=False))
    left_open.append(job)
    if job.rank == culprit:
        raise ValueError("no more data")
    if culprit is not None:
        job.communicator.barrier("world", Tag(Purpose.CONTROL))


def test_a_job_that_is_left_open_does_not_swallow_errors_of_the_next():
    for _ in range(2):
        run_distributed(leaves_a_job_open, 2, None)
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(leaves_a_job_open, 2, 1)
    assert "because rank 1 failed: ValueError: no more data" in caught.value.errors[0].error


def variable() -> str | None:
    return os.environ.get("SOME_VARIABLE")


def test_environment_is_the_callers_and_what_is_given(monkeypatch):
    monkeypatch.setenv("SOME_VARIABLE", "mine")
    assert run_distributed(variable, 1) == ["mine"]
    assert run_distributed(variable, 1, env={"SOME_VARIABLE": "given"}) == ["given"]


def raise_on(rank: int, wait: bool) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        raise ValueError("what went wrong")
    if wait:
        dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_first_rank_to_fail_is_named_with_every_stack(culprit):
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(raise_on, 3, culprit, True)
    message = str(caught.value)
    assert message.startswith(f"rank {culprit} of 3 failed first: ValueError: what went wrong")
    assert set(caught.value.errors) == {0, 1, 2}
    assert next(iter(caught.value.errors)) == culprit
    for rank in range(3):
        assert f"--- rank {rank}: " in message
    assert 'raise ValueError("what went wrong")' in message
    assert "dist.all_reduce(torch.ones(1))" in message


def test_ranks_that_succeed_do_not_hide_one_that_fails():
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(raise_on, 3, 2, False)
    assert list(caught.value.errors) == [2]


def hang(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        time.sleep(1000)


def test_a_time_out_shows_where_ranks_are():
    run_distributed(pid, 2)  # has this module imported, which may take a while
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(hang, 2, 1, timeout=5)
    assert list(caught.value.errors) == [1]
    error = caught.value.errors[1]
    assert error.error == "did not end within 5 s"
    assert "in hang" in error.stack
    first_line = str(caught.value).splitlines()[0]
    assert "rank 1 was in hang (test_run_distributed.py:" in first_line


def hang_without_the_interpreter() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")  # for ever, holding the lock that all Python code needs


def test_a_time_out_ends_ranks_that_are_deaf():
    run_distributed(pid, 1)
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(hang_without_the_interpreter, 1, timeout=5)
    assert "in hang_without_the_interpreter" in caught.value.errors[0].stack


def die(how: str) -> None:
    if int(os.environ["RANK"]) == 0:
        os._exit(3) if how == "exit" else os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(("how", "text"), [("exit", "exit code 3"), ("signal", "signal SIGSEGV")])
def test_a_rank_that_dies_says_how(how, text):
    with pytest.raises(RanksFailedError, match=f"rank 0 of 2 failed first: .* {text}"):
        run_distributed(die, 2, how)


def unpicklable() -> object:
    return lambda: None


def test_a_result_that_cannot_travel_is_an_error():
    with pytest.raises(RanksFailedError, match=r"[Pp]ickle"):
        run_distributed(unpicklable, 1)


def test_only_functions_of_modules_can_run():
    with pytest.raises(ValueError, match="must be defined at the level of a module"):
        run_distributed(lambda: None, 1)


def alive(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]
    return False


def gone(processes: list[int]) -> bool:
    """Whether all are gone, within a minute."""
    for _ in range(1200):
        if not any(map(alive, processes)):
            return True
        time.sleep(0.05)
    return False


def test_ranks_that_fail_leave_no_process():
    before = run_distributed(pid, 3)
    with pytest.raises(RanksFailedError):
        run_distributed(raise_on, 3, 1, True)
    assert gone(before)


SCRIPT = """
import os, sys
sys.path[:] = {path!r}
from drivetrain.testing import run_distributed
import {module} as this

print(*run_distributed(this.pid, 2), flush=True)
if {hang}:
    run_distributed(this.hang, 2, 1)
"""


@pytest.mark.parametrize("ending", ["end", "kill while idle", "kill while busy"])
def test_no_process_outlives_its_caller(ending, tmp_path):
    path = [str(Path(__file__).parent), *sys.path]
    script = SCRIPT.format(path=path, module=Path(__file__).stem, hang=ending == "kill while busy")
    if ending == "kill while idle":
        script += "\nimport time; time.sleep(1000)"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    ranks = [int(word) for word in process.stdout.readline().split()]
    assert len(ranks) == 2
    if ending == "end":
        assert process.wait() == 0
    else:
        time.sleep(0.2)
        process.kill()
        process.wait()
    process.stdout.close()
    assert gone(ranks)
    assert list(tmp_path.iterdir()) == []


def test_a_guarded_script_may_run_its_own_functions(tmp_path: Path):
    """On a rank the guard must not hold, or every rank would start ranks in turn."""
    script = tmp_path / "script.py"
    script.write_text(
        "from drivetrain.testing import run_distributed\n"
        "def own(): return 3\n"
        "if __name__ == '__main__': print(run_distributed(own, 2))\n"
    )
    found = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert (found.stdout.strip(), found.returncode) == ("[3, 3]", 0), found.stderr
