"""Jobs whose ranks do not do the same: every rank raises, and the message names the odd one."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drivetrain_watchdog.plugin import Watchdog

import drivetrain
from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import CommunicationError
from drivetrain.plan.registry import Registry
from drivetrain.testing import PluginConformance, RanksFailedError, data, run_distributed
from drivetrain.testing.models import mlp

REGISTRY = Registry.installed().with_plugins(Watchdog)
TAG = Tag(Purpose.ACTIVATION, "planted", "test")


class TestWatchdog(PluginConformance):
    plugin = Watchdog
    config = {"communication": {"watchdog": {}}}


def engine_of(patience: float = 300.0, **keys: Any) -> drivetrain.Engine:
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "communication": {"watchdog": {"patience_seconds": patience}},
        **keys,
    }
    return drivetrain.initialize(model=mlp(), config=config, registry=REGISTRY)[0]


def step(engine: drivetrain.Engine) -> None:
    inputs, targets = data.vectors(4)
    share = engine.train_micro_batch_size_per_gpu()
    rows = slice(engine.job.rank * share, (engine.job.rank + 1) * share)
    engine.backward(engine(inputs[rows], targets[rows]))
    engine.step()


# -- what ranks do; each is given the engine after two steps ---------------------------------------

Engine = drivetrain.Engine


def saves_alone(engine: Engine, folder: str) -> None:
    if engine.job.rank == 1:
        engine.save_checkpoint(folder)
    step(engine)


def ends_early(engine: Engine, _: str) -> None:
    for _ in range(2 + (engine.job.rank == 0)):
        step(engine)
    if engine.job.rank == 1:
        engine.job.close()


def catches(engine: Engine, _: str) -> None:
    """The script of rank 1 skips a bad sample, so its loop has one step less."""
    for number in range(4):
        try:
            if engine.job.rank == 1 and number == 1:
                engine(torch.ones(2, 3), torch.ones(2, 4))
            step(engine)
        except RuntimeError:
            continue
    if engine.job.rank == 1:
        engine.job.close()


def is_stopped(engine: Engine, _: str) -> None:
    pid = torch.tensor([os.getpid()])
    engine.job.communicator.broadcast(pid, "world", TAG, source=1)
    if engine.job.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        step(engine)
        step(engine)
    except CommunicationError:
        if engine.job.rank == 0:
            os.kill(int(pid), signal.SIGCONT)
        raise


def sleeps(engine: Engine, _: str) -> None:
    if engine.job.rank == 1:
        time.sleep(100)
    step(engine)


def sends_another_shape(engine: Engine, _: str) -> None:
    communicator, rank = engine.job.communicator, engine.job.rank
    if rank == 0:
        communicator.send(torch.ones(2, 3), "world", TAG, to=1)
    else:
        communicator.receive(torch.ones(3, 2), "world", TAG, source=0)
    step(engine)
    time.sleep(30)


def waits_for_a_message(engine: Engine, _: str) -> None:
    communicator = engine.job.communicator
    if engine.job.rank == 0:
        communicator.receive(torch.ones(2), "world", TAG, source=1)
    else:
        communicator.barrier("world", TAG)


def has_another_shape(engine: Engine, _: str) -> None:
    size = 5 + engine.job.rank
    engine.job.communicator.all_reduce(torch.ones(size), "world", TAG)
    time.sleep(30)


def has_another_dtype(engine: Engine, _: str) -> None:
    dtype = torch.float32 if engine.job.rank == 0 else torch.int32
    engine.job.communicator.all_reduce(torch.ones(6, dtype=dtype), "world", TAG)
    time.sleep(30)


def has_another_source(engine: Engine, _: str) -> None:
    engine.job.communicator.broadcast(torch.ones(6), "world", TAG, source=engine.job.rank)
    time.sleep(30)


def swaps_alike(engine: Engine, _: str) -> None:
    """Numbers are mixed up, and nothing hangs."""
    tags = [Tag(Purpose.GRADIENT, key, "test") for key in ("one", "other")]
    for tag in tags if engine.job.rank == 0 else tags[::-1]:
        engine.job.communicator.all_reduce(torch.ones(6), "world", tag)
    for _ in range(1000):
        step(engine)
        time.sleep(0.02)


def takes_a_branch(engine: Engine, _: str) -> None:
    if engine.job.rank == 0:
        engine.job.communicator.all_reduce(torch.ones(1), "world", TAG)
    step(engine)


def is_killed(engine: Engine, _: str) -> None:
    if engine.job.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    step(engine)


def evaluates_alone(engine: Engine, _: str) -> None:
    if engine.job.rank == 1:
        engine.eval_batch(iter([data.vectors(2)]))
    step(engine)


Planted = Callable[[Engine, str], None]

PLANTED: dict[Planted, tuple[str, ...]] = {
    saves_alone: (
        "rank 1 issues all_reduce of control/checkpoint agreement",
        "rank 0 issues all_reduce of gradient/",
        "in saves_alone",
        "in step 3",
    ),
    ends_early: (
        "rank 0 waits in all_reduce of",
        "for rank 1, which has closed its job after all_reduce of",
    ),
    catches: ("rank 1, which has closed its job", "its script has caught RuntimeError: mat1"),
    is_stopped: ("for rank 1, which is stopped",),
    sleeps: ("rank 1, which stands still for", "in sleeps", "in step 3"),
    sends_another_shape: ("message from rank 0 to rank 1, number 1", "[2, 3]", "[3, 2]"),
    waits_for_a_message: ("ranks wait for each other", "barrier of", "send_receive of"),
    has_another_shape: ("float32 [5]", "float32 [6]", "rank 1 issues all_reduce"),
    has_another_dtype: ("float32 [6]", "int32 [6]"),
    has_another_source: ("from position 0", "from position 1"),
    swaps_alike: ("rank 0 issues all_reduce of gradient/one", "rank 1 issues all_reduce of"),
    takes_a_branch: ("rank 0 issues all_reduce of activation/planted", "rank 1 issues all_reduce"),
    evaluates_alone: ("rank 1 issues all_reduce of control/mean loss of a batch",),
    is_killed: ("rank 1 died",),
}
ORDINARY = (saves_alone, ends_early, is_stopped, waits_for_a_message)


def planted(what: Planted, folder: str) -> None:
    engine = engine_of(patience=3.0 if what is sleeps else 300.0)
    for _ in range(2):
        step(engine)
    what(engine, folder)


@pytest.mark.parametrize(
    "what",
    [pytest.param(w, marks=() if w in ORDINARY else pytest.mark.long) for w in PLANTED],
    ids=lambda what: str(what.__name__),
)
def test_every_rank_says_who_did_what(what: Planted, tmp_path: Any) -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(planted, 2, what, str(tmp_path), timeout=60.0)
    errors = caught.value.errors
    # A rank that is dead, or has closed its job and left, raises nothing any more.
    ranks = [0] if what in (is_killed, ends_early, catches) else [0, 1]
    # gloo ends the process of a rank that gets more bytes than it expects; the other says why.
    ranks = [r for r in ranks if "signal SIGABRT" not in errors[r].error]
    assert ranks
    for rank in ranks:
        for words in PLANTED[what]:
            assert words in errors[rank].error
        assert "CommunicationError" in errors[rank].error


# -- what is no fault ------------------------------------------------------------------------------


def slow(seconds: float) -> list[str]:
    """Rank 1 computes and sleeps for longer than it takes to find a rank that is missing."""
    messages: list[str] = []
    logging.getLogger("drivetrain.watchdog").addFilter(
        lambda r: messages.append(r.getMessage()) or True
    )
    engine = engine_of()
    for number in range(4):
        if engine.job.rank == 1 and number == 2:
            time.sleep(seconds)
        step(engine)
    return messages


def test_a_slow_rank_is_no_fault() -> None:
    assert run_distributed(slow, 2, 4.0) == [[], []]


@pytest.mark.long
def test_who_is_slow_is_said() -> None:
    waiting, sleeping = run_distributed(slow, 2, 13.0)
    assert sleeping == []
    assert len(waiting) == 1
    assert "for rank 1, which is at" in waiting[0]
    assert "in slow" in waiting[0]


def many_steps(count: int) -> int:
    engine = engine_of(patience=1.0)
    for number in range(count):
        if number % 500 == 499 and engine.job.rank == 1:
            time.sleep(0.3)
        step(engine)
    return engine.global_steps


@pytest.mark.long
def test_no_false_alarm() -> None:
    assert run_distributed(many_steps, 2, 10_000, timeout=900.0) == [10_000] * 2
