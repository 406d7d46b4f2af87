"""Checkpoints of the released version load, on other ranks and at other stages of ZeRO."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from drivetrain.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parent / "data" / "released_checkpoint"))

import released_run

FOLDER = released_run.HERE


def load(stage: int, ranks: int) -> tuple[released_run.State, list[float]]:
    engine = released_run.make(stage, ranks)
    released_run.train(engine, range(1))  # what is loaded takes the place of something
    path, client_state = engine.load_checkpoint(str(FOLDER / "checkpoint"))
    assert path is not None
    assert path.endswith(released_run.TAG)
    assert client_state == released_run.CLIENT_STATE
    assert engine.global_steps == released_run.SAVED
    state = released_run.state(engine)
    losses = released_run.train(engine, range(released_run.SAVED, released_run.STEPS))
    engine.destroy()
    return state, losses


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_released_checkpoint_loads_with_every_number_and_goes_on(stage: int, ranks: int) -> None:
    with np.load(FOLDER / "expected.npz") as file:
        expected = dict(file)
    losses = expected.pop("losses")
    ends = run_distributed(load, ranks, stage, ranks)
    found = released_run.whole([state for state, _ in ends])
    assert set(found) == set(expected)
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=key)
    # Parameters are bfloat16, and sums over ranks are rounded in another order.
    np.testing.assert_allclose(np.mean([own for _, own in ends], axis=0), losses, rtol=0.02)
