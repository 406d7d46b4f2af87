"""Ranks that wait for each other in different collectives end, and say in which."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.contracts import Communicator, Purpose, Tag
from drivetrain.testing import run_distributed
from drivetrain.testing.distributed import RanksFailedError

GLOO = {"DRIVETRAIN_DISABLE_PLUGINS": "drivetrain-cpu"}
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}


def start() -> drivetrain.Engine:
    torch.manual_seed(0)
    return drivetrain.initialize(model=nn.Linear(2, 1), config=CONFIG)[0]


def soon() -> Any:
    """Compare after a tenth of a second."""
    return patch("drivetrain.communication.torch_communicator.LONG", timedelta(seconds=0.1))


def reduce(communicator: Communicator, name: str, **options: Any) -> Any:
    total = torch.ones(3)
    tag = Tag(Purpose.STATE, name)
    return communicator.all_reduce(total, "data", tag, **options), total


def another_while_one_is_under_way() -> None:
    """The rank waits for the first of two, of which the second is the one that differs."""
    engine = start()
    communicator, tag = engine.job.communicator, Tag(Purpose.STATE, "ours")
    with soon():
        if engine.job.rank == 1:
            communicator.all_gather(torch.ones(6), torch.ones(3), "data", tag, asynchronous=True)
        handle, _ = reduce(communicator, "theirs", asynchronous=True)
        handle.wait()
        reduce(communicator, "last")


def test_ranks_in_different_collectives_end_and_name_them() -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(another_while_one_is_under_way, 2, env=GLOO, timeout=60)
    assert set(caught.value.errors) == {0, 1}
    for error in caught.value.errors.values():
        assert "ranks are in different collectives: rank" in error.error
        assert " over 'data'" in error.error


def slow() -> float:
    """Both ranks come late, one after the other."""
    engine = start()
    with soon():
        for late, name in enumerate(("first", "second")):
            time.sleep(0.7 * (engine.job.rank == late))
            _, total = reduce(engine.job.communicator, name)
    return float(total.sum())


def test_slow_ranks_are_waited_for() -> None:
    assert run_distributed(slow, 2, env=GLOO) == [6.0, 6.0]
