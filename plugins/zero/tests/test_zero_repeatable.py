"""Runs repeat bit for bit, and checkpoints resume: bit for bit in the same layout, else as close
as plain torch is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from zero_harness import (
    PRECISIONS,
    Parameters,
    Run,
    assert_parameters_equal,
    config,
    plain,
    train,
    train_steps,
    whole_parameters,
)
from zero_models import ADAPTED, ROUTED, UNEVEN

from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed
from drivetrain.testing.reference import Case

STAGES = (1, 2, 3)
BEFORE, STEPS = 3, 6
WORLD = 4
"""Data shards times accumulation of the runs whose layout changes."""


def assert_same_bits(found: Parameters, expected: Parameters) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of all that this rank keeps, by kind, name and place."""
    engine.states.flush()
    return {
        f"{f.kind}/{f.name}@{[box.global_offset for box in f.boxes]}": f.read().clone()
        for f in engine.states.fragments()
        if f.kind != "gradient"
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", [UNEVEN, ROUTED], ids=["uneven", "routed"])
@pytest.mark.parametrize("reduction", ["micro_batch", "boundary"])
def test_two_runs_end_with_the_same_bits(stage: int, case: Case, reduction: str) -> None:
    settings = config(
        stage, accumulation=2, gradient_clipping=0.1, zero={"gradient_reduction": reduction}
    )
    first, second = (run_distributed(train, 3, Run(settings, case, STEPS)) for _ in range(2))
    for (losses, parameters), (losses_again, again) in zip(first, second, strict=True):
        assert losses == losses_again
        assert_same_bits(parameters, again)
        assert_same_bits(parameters, first[0][1])


# -- checkpoints -----------------------------------------------------------------------------------


def goes_on_after_saving(run: Run, folder: str) -> tuple[list[float], Parameters]:
    engine = run.engine()
    train_steps(run, engine, range(BEFORE))
    engine.save_checkpoint(folder)
    losses = train_steps(run, engine, range(BEFORE, STEPS))
    state = everything(engine)
    engine.destroy()
    return losses, state


def goes_on_after_loading(run: Run, folder: str) -> tuple[list[float], Parameters]:
    engine = run.engine()
    train_steps(run, engine, range(1))  # what is loaded replaces this
    place, _ = engine.load_checkpoint(folder)
    assert place is not None
    losses = train_steps(run, engine, range(BEFORE, STEPS))
    state = everything(engine)
    engine.destroy()
    return losses, state


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_resuming_in_the_same_layout_continues_bit_for_bit(
    stage: int, precision: str, tmp_path: Path
) -> None:
    settings = config(stage, accumulation=2, gradient_clipping=0.1, **PRECISIONS[precision][0])
    run = Run(settings, UNEVEN, STEPS)
    straight = run_distributed(goes_on_after_saving, 3, run, str(tmp_path))
    resumed = run_distributed(goes_on_after_loading, 3, run, str(tmp_path))
    for (losses, state), (losses_resumed, state_resumed) in zip(straight, resumed, strict=True):
        assert losses_resumed == losses
        assert_same_bits(state_resumed, state)


@pytest.mark.parametrize("persistent", [0, 10**6])
@pytest.mark.parametrize("case", [ADAPTED, ROUTED], ids=["adapted", "routed"])
def test_frozen_and_gathered_parameters_resume_bit_for_bit(
    persistent: int, case: Case, tmp_path: Path
) -> None:
    run = Run(config(3, zero={"stage3_param_persistence_threshold": persistent}), case, STEPS)
    straight = run_distributed(goes_on_after_saving, 2, run, str(tmp_path))
    resumed = run_distributed(goes_on_after_loading, 2, run, str(tmp_path))
    for (losses, state), (losses_resumed, state_resumed) in zip(straight, resumed, strict=True):
        assert losses_resumed == losses
        assert_same_bits(state_resumed, state)


def saves(run: Run, folder: str) -> None:
    engine = run.engine()
    train_steps(run, engine, range(BEFORE))
    engine.save_checkpoint(folder)
    engine.destroy()


def loads(run: Run, folder: str) -> Parameters:
    engine = run.engine()
    engine.load_checkpoint(folder)
    train_steps(run, engine, range(BEFORE, STEPS))
    parameters = whole_parameters(engine)
    engine.destroy()
    return parameters


def layout(stage: int, world: int, **zero: Any) -> tuple[Run, int]:
    """A job on ``world`` ranks with the same global batch as on all others."""
    settings = config(stage, accumulation=WORLD // world, gradient_clipping=0.5, zero=zero)
    return Run(settings, UNEVEN, STEPS), world


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(layout(0, 2), layout(1, 2), id="0 to 1"),
        pytest.param(layout(1, 2), layout(2, 4), id="1 to 2, more ranks"),
        pytest.param(layout(2, 4), layout(3, 2), id="2 to 3, fewer ranks"),
        pytest.param(layout(3, 4), layout(0, 1), id="3 to 0, one rank"),
        pytest.param(layout(3, 2), layout(3, 4), id="3, more ranks"),
        pytest.param(layout(0, 1), layout(3, 4), id="0 to 3, more ranks"),
        pytest.param(layout(3, 4), layout(1, 4), id="3 to 1"),
        pytest.param(layout(2, 2), layout(2, 1), id="2, one rank"),
        pytest.param(layout(3, 4, mics_shard_size=2), layout(2, 4), id="shard groups to 2"),
        pytest.param(layout(1, 4), layout(3, 4, mics_shard_size=2), id="1 to shard groups"),
    ],
)
def test_any_layout_loads_what_any_other_saved(
    source: tuple[Run, int], target: tuple[Run, int], tmp_path: Path
) -> None:
    run_distributed(saves, source[1], source[0], str(tmp_path))
    _, expected = plain(Run(config(0, gradient_clipping=0.5), UNEVEN, STEPS), WORLD)
    for parameters in run_distributed(loads, target[1], target[0], str(tmp_path)):
        assert_parameters_equal(parameters, expected)
