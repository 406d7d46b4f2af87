"""The thread that updates on the host."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from drivetrain_offload.host.worker import Worker

from drivetrain.errors import TrainingError


@pytest.fixture
def worker():
    made = Worker(cores=3)
    yield made
    made.close()


def test_work_runs_in_order_and_the_next_is_prepared_before_one_runs(worker: Worker) -> None:
    seen: list[str] = []
    held = threading.Event()
    worker.submit(lambda: held.wait(60) and None)
    for name in "abc":
        ticket = worker.submit(
            lambda name=name: seen.append(f"run {name}"),
            prepare=lambda name=name: seen.append(f"prepare {name}"),
        )
    held.set()
    ticket.wait()
    expected = ["prepare a", "prepare b", "run a", "prepare c", "run b", "run c"]
    # the first may have begun before there was a second
    assert [s for s in seen if s != "prepare a"] == [s for s in expected if s != "prepare a"]


def test_an_error_is_raised_by_who_waits_and_stops_nobody_else(worker: Worker) -> None:
    failed = worker.submit(lambda: 1 / 0 and None)
    after = worker.submit(lambda: None)
    after.wait()
    with pytest.raises(ZeroDivisionError):
        failed.wait()
    failed.settle()
    assert failed.done


def test_what_cannot_be_prepared_does_not_run(worker: Worker) -> None:
    ran: list[int] = []
    ticket = worker.submit(lambda: ran.append(1), prepare=lambda: 1 / 0 and None)
    with pytest.raises(ZeroDivisionError):
        ticket.wait()
    assert not ran


def test_closing_ends_the_thread_and_drops_what_is_queued() -> None:
    worker = Worker(cores=1)
    begun, held = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        held.wait(60)

    running, queued = worker.submit(block), worker.submit(lambda: None)
    begun.wait(60)

    def release() -> None:
        queued.settle()  # closing does that, and then waits for what runs
        held.set()

    releasing = threading.Thread(target=release)
    releasing.start()
    worker.close()
    releasing.join()
    running.wait()
    with pytest.raises(TrainingError, match="closed before the update"):
        queued.wait()
    with pytest.raises(TrainingError, match="after their job was closed"):
        worker.submit(lambda: None)
    worker.drain()
    assert not [t for t in threading.enumerate() if t.name == "drivetrain-offload"]


def test_a_process_ends_well_though_nobody_closed_its_job() -> None:
    script = """
import threading, time, torch
from drivetrain_offload.host.worker import Worker
weights, begun = torch.zeros(1 << 20), threading.Event()
def work():
    begun.set()
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        weights.add_(1)
    print("done")
worker = Worker(cores=1)
worker.submit(work)
worker.submit(lambda: print("dropped or done"))
begun.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("done")
    assert done.stderr == ""


def test_a_worker_without_work_has_no_thread() -> None:
    before = set(threading.enumerate())
    worker = Worker(cores=1)
    worker.drain()
    assert set(threading.enumerate()) <= before
    worker.close()


def test_its_number_of_threads_is_its_own(worker: Worker) -> None:
    found: list[int] = []
    before = torch.get_num_threads()
    worker.submit(lambda: found.append(torch.get_num_threads())).wait()
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert found == [3, before]
    assert torch.get_num_threads() == before


def test_it_records_no_graph(worker: Worker) -> None:
    found: list[bool] = []
    worker.submit(lambda: found.append(torch.is_grad_enabled())).wait()
    assert found == [False]
