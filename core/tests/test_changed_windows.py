"""Windows whose length scripts change: each update is the mean of the micro-batches in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError


@contextmanager
def engine_of(steps: int = 2, **changes: Any) -> Iterator[Engine]:
    """One weight, 0 at first, that SGD at rate 1 moves by minus the mean of the gradients."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        **changes,
    }
    engine = drivetrain.initialize(model=module, config=config)[0]
    yield engine
    engine.destroy()


def train(engine: Engine, gradients: list[float], **options: Any) -> list[float]:
    """By how much each micro-batch moves the weight."""
    moves = []
    for gradient in gradients:
        before = engine.module.weight.item()
        engine.backward(gradient * engine(torch.ones(1, 1)).sum(), **options)
        engine.step()
        moves.append(engine.module.weight.item() - before)
    return moves


@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_longer_window_begins_after_the_last_has_ended(done: int) -> None:
    with engine_of(2) as engine:
        train(engine, [1.0] * 2 * done)
        engine.set_train_batch_size(4)
        assert train(engine, [1.0, 2.0, 3.0, 6.0]) == [0.0, 0.0, 0.0, -3.0]
        assert train(engine, [4.0] * 4) == [0.0, 0.0, 0.0, -4.0]
        assert engine.global_samples == 2 * done + 8


@pytest.mark.parametrize(
    ("old", "done", "new", "expected"),
    [
        (2, 1, 4, [0.0, 0.0, -(1 + 2 + 3 + 4) / 4, 0.0]),
        (4, 1, 2, [-(1 + 2) / 2, 0.0, -(3 + 4) / 2, 0.0]),
        (4, 3, 2, [-(1 + 1 + 1 + 2) / 4, 0.0, -(3 + 4) / 2, 0.0]),
        (3, 2, 1, [-(1 + 1 + 2) / 3, -3.0, -4.0, -5.0]),
    ],
)
def test_a_window_under_way_becomes_the_mean_of_what_is_in_it(
    old: int, done: int, new: int, expected: list[float]
) -> None:
    with engine_of(old) as engine:
        train(engine, [1.0] * done)
        engine.set_train_batch_size(new)
        assert train(engine, [2.0, 3.0, 4.0, 5.0]) == pytest.approx(expected)


def between_backward_and_step(engine: Engine, change: Callable[[], None]) -> float:
    before = engine.module.weight.item()
    engine.backward(engine(torch.ones(1, 1)).sum())
    change()
    engine.step()
    return engine.module.weight.item() - before


def test_a_change_between_backward_and_step_counts_at_once() -> None:
    with engine_of(1) as engine:
        assert between_backward_and_step(engine, lambda: engine.set_train_batch_size(2)) == 0.0
        assert train(engine, [3.0]) == [-2.0]
        assert between_backward_and_step(engine, lambda: engine.set_train_batch_size(1)) == -1.0


def test_losses_that_are_divided_already_are_divided_by_the_steps_of_now() -> None:
    with engine_of(2) as engine:
        train(engine, [1.0, 1.0])
        engine.set_train_batch_size(4)
        moves = train(engine, [g / 4 for g in (1.0, 2.0, 3.0, 6.0)], scale_wrt_gas=False)
        assert moves == [0.0, 0.0, 0.0, -3.0]


def test_after_a_boundary_set_by_hand_a_whole_window_follows() -> None:
    with engine_of(2) as engine:
        engine.set_gradient_accumulation_boundary(True)
        assert train(engine, [2.0]) == [-1.0]  # by hand, the divisor stays
        engine.set_gradient_accumulation_boundary(None)
        assert train(engine, [1.0, 3.0]) == [0.0, -2.0]
        engine.set_gradient_accumulation_boundary(False)
        train(engine, [1.0])
        engine.set_gradient_accumulation_boundary(None)
        assert train(engine, [3.0]) == [-2.0]


def test_a_boundary_set_in_a_window_that_has_gradients_takes_all_of_them() -> None:
    with engine_of(4) as engine:
        train(engine, [1.0])

        def ends() -> None:
            engine.set_gradient_accumulation_boundary(True)

        assert between_backward_and_step(engine, ends) == -0.5  # (1 + 1) / 4


def test_a_skipped_step_and_a_load_begin_a_window(tmp_path: Path) -> None:
    with engine_of(2) as engine:
        train(engine, [1.0])
        engine.skip_step()
        assert train(engine, [1.0, 3.0]) == [0.0, -2.0]
        train(engine, [7.0])
        engine.save_checkpoint(str(tmp_path))
        engine.load_checkpoint(str(tmp_path))
        assert train(engine, [1.0, 3.0]) == [0.0, -2.0]
        engine.set_train_batch_size(3)
        assert train(engine, [1.0, 2.0, 3.0]) == [0.0, 0.0, -2.0]


def test_a_micro_batch_without_samples_is_refused() -> None:
    with engine_of() as engine:
        with pytest.raises(ConfigError, match="must have samples, got 0"):
            engine.set_train_micro_batch_size(0)
        engine.set_train_micro_batch_size(5)
        train(engine, [1.0, 1.0])
        assert engine.global_samples == 10
