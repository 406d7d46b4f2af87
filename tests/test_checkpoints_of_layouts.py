"""Checkpoints move between layouts of stages, shared layers, shards of data and ZeRO's stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from three_axes import Curve, alone, close, make, train

from drivetrain.testing import run_distributed

STEPS = 4
Layout = tuple[int, int, int]


def save(folder: str, layout: Layout, changes: dict[str, Any]) -> None:
    engine = make(*layout, **changes)
    train(engine, 0, 2)
    engine.save_checkpoint(folder)
    close(engine)


def load(folder: str, rows: list[tuple[Layout, dict[str, Any]]]) -> list[Curve]:
    found = []
    for layout, changes in rows:
        engine = make(*layout, **changes)
        engine.load_checkpoint(folder)
        found.append(train(engine, 2, STEPS))
        close(engine)
    return found


def check(
    folder: Path, saved: tuple[Layout, dict[str, Any]], *rows: tuple[Layout, dict[str, Any]]
) -> None:
    """Save in one layout, and go on in others."""
    expected = alone(2, STEPS)[0]
    run_distributed(save, world(saved[0]), str(folder), *saved, timeout=200)
    for size in {world(layout) for layout, _ in rows}:
        some = [row for row in rows if world(row[0]) == size]
        for curves in run_distributed(load, size, str(folder), some, timeout=200):
            for row, curve in zip(some, curves, strict=True):
                for point, want in zip(curve, expected, strict=True):
                    assert point == pytest.approx(want, rel=1e-8), row


def world(layout: Layout) -> int:
    return layout[0] * layout[1] * layout[2]


INTERLEAVED: dict[str, Any] = {"pipeline": {"schedule": "interleaved"}}
V_SHAPE: dict[str, Any] = {"pipeline": {"schedule": "zb_v"}}


def test_a_checkpoint_of_three_axes_loads_in_any_layout(tmp_path: Path) -> None:
    check(
        tmp_path,
        ((2, 2, 1), {"stage": 1, **INTERLEAVED}),
        ((1, 1, 1), {}),
        ((2, 1, 2), {"stage": 3, **V_SHAPE}),
        ((4, 1, 1), {"stage": 2}),
        ((1, 2, 2), {"stage": 2}),
    )


def test_a_checkpoint_of_one_process_loads_on_three_axes(tmp_path: Path) -> None:
    check(
        tmp_path,
        ((1, 1, 1), {}),
        ((2, 1, 1), V_SHAPE),
        ((2, 2, 1), {"stage": 3}),
        ((4, 1, 1), {"stage": 1}),
    )


@pytest.mark.long
def test_a_checkpoint_of_eight_ranks_loads_in_any_layout(tmp_path: Path) -> None:
    check(
        tmp_path,
        ((2, 2, 2), {"stage": 3, **V_SHAPE}),
        ((1, 1, 1), {}),
        ((1, 1, 2), {"stage": 1}),
        ((2, 1, 1), INTERLEAVED),
        ((4, 1, 2), {"stage": 2}),
        ((4, 2, 1), {"stage": 1}),
        ((2, 2, 2), {"stage": 0}),
    )


def changed_rate(folder: str, stages: int, saves: bool) -> list[float]:
    """Rates of this rank's group, which a script had changed before it saved."""
    engine = make(stages, 1, 1)
    assert engine.optimizer is not None
    if saves:
        engine.optimizer.param_groups[0]["lr"] = 0.025
        engine.save_checkpoint(folder)
    else:
        engine.load_checkpoint(folder)
    found = [group["lr"] for group in engine.optimizer.param_groups]
    close(engine)
    return found


def test_hyper_parameters_of_every_stage_are_saved(tmp_path: Path) -> None:
    run_distributed(changed_rate, 2, str(tmp_path), 2, True)
    for rates in run_distributed(changed_rate, 4, str(tmp_path), 4, False):
        assert rates == [0.025]
