"""A checkpoint goes through any other layout and back, and a resumed run is the unbroken one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from layouts import Layout, hashes, make, train

from drivetrain.communication.process_group import Ranks
from drivetrain.testing import run_distributed

LAYOUTS = [
    Layout(0, 1),
    Layout(0, 3, "bf16"),
    Layout(1, 1, "bf16"),
    Layout(1, 2),
    Layout(1, 3, "fp32", "host"),
    Layout(1, 4, "bf16"),
    Layout(2, 2, "bf16", "files"),
    Layout(2, 3, in_forward=True),
    Layout(2, 4),
    Layout(3, 1, "fp32", "all-files"),
    Layout(3, 2, "bf16", "all-files"),
    Layout(3, 3, "fp32", "host"),
    Layout(3, 4, "bf16"),
]


# -- functions that run on every rank --------------------------------------------------------------


def train_and_save(folder: str, layout: Layout) -> None:
    torch.manual_seed(Ranks.current().rank)
    engine = make(layout)
    train(engine, 3)
    engine.save_checkpoint(folder, str(layout))
    engine.destroy()


def pass_on(source: str, target: str, layout: Layout, tags: list[str]) -> None:
    """Load each checkpoint in this layout and save what came of it."""
    engine = make(layout)
    for tag in tags:
        engine.load_checkpoint(source, tag)
        engine.save_checkpoint(target, f"{tag}-via-{layout}")
    engine.destroy()


def train_unbroken(folder: str, layout: Layout, saves: list[int]) -> list[float]:
    torch.manual_seed(Ranks.current().rank)
    engine = make(layout)
    losses = []
    for step in range(1, saves[-1] + 51):
        losses += train(engine, 1)
        if step in saves or step - 50 in saves:
            engine.save_checkpoint(folder, f"unbroken{step}")
    engine.destroy()
    return losses


def resume(folder: str, layout: Layout, step: int) -> list[float]:
    engine = make(layout)
    engine.load_checkpoint(folder, f"unbroken{step}")
    losses = train(engine, 50)
    engine.save_checkpoint(folder, f"resumed{step + 50}")
    engine.destroy()
    return losses


# -- claims ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout's own checkpoint, and each of them saved again by every other layout."""
    folder = tmp_path_factory.mktemp("layouts")
    layouts = [layout.below(folder) for layout in LAYOUTS]
    for layout in layouts:
        run_distributed(train_and_save, layout.world, str(folder / "own"), layout)
    for layout in layouts:
        tags = [str(other) for other in LAYOUTS if other != layout]
        target = str(folder / "there")
        run_distributed(pass_on, layout.world, str(folder / "own"), target, layout, tags)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_there_and_back_through_every_other_layout_the_content_is_the_same(
    everywhere: Path, layout: Layout, tmp_path: Path
) -> None:
    others = [other for other in LAYOUTS if other != layout]
    tags = [f"{layout}-via-{other}" for other in others]
    there = str(everywhere / "there")
    placed = layout.below(tmp_path)
    run_distributed(pass_on, layout.world, there, str(tmp_path), placed, tags)
    expected = hashes(everywhere / "own", str(layout))
    kinds = {key.split()[0] for key in expected}
    assert {"parameter", "exp_avg", "exp_avg_sq", "step"} <= kinds
    for tag in tags:
        assert hashes(tmp_path, f"{tag}-via-{layout}") == expected, tag


@pytest.mark.parametrize(
    "layout",
    [
        Layout(0, 1),
        Layout(1, 3),
        Layout(2, 2, "bf16", in_forward=True),
        Layout(2, 2, "bf16", "host"),
        Layout(3, 2, "bf16"),
        Layout(3, 2, "bf16", "all-files"),
    ],
    ids=str,
)
def test_a_run_resumed_at_random_steps_is_the_unbroken_one_50_steps_on(
    layout: Layout, tmp_path: Path
) -> None:
    layout = layout.below(tmp_path)
    seed = random.SystemRandom().randrange(1 << 30)
    saves = sorted(random.Random(seed).sample(range(1, 40), 3))
    folder = str(tmp_path)
    unbroken = run_distributed(train_unbroken, layout.world, folder, layout, saves)
    for step in saves:
        resumed = run_distributed(resume, layout.world, folder, layout, step)
        for rank, losses in enumerate(resumed):
            assert losses == unbroken[rank][step : step + 50], (seed, step)
        assert hashes(tmp_path, f"resumed{step + 50}") == hashes(tmp_path, f"unbroken{step + 50}")
