"""Lines of JSON hold the numbers of training, one line for each step, on the ranks that write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from drivetrain_jsonl import JsonLines, JsonLinesWriter

import drivetrain
from drivetrain.monitor import Event, write_events
from drivetrain.plan.registry import Registry
from drivetrain.testing import PluginConformance, data, run_distributed
from drivetrain.testing.models import mlp


class TestJsonLines(PluginConformance):
    plugin = JsonLines
    config = {"json_lines": {"enabled": True}}


def train(section: dict[str, Any], steps: int = 3) -> None:
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "gradient_clipping": 100.0,
        "json_lines": {"enabled": True, **section},
    }
    engine, *_ = drivetrain.initialize(
        model=mlp(), config=config, registry=Registry.installed().with_plugins(JsonLines)
    )
    inputs, targets = data.vectors(4)
    share = engine.train_micro_batch_size_per_gpu()
    rows = slice(engine.job.rank * share, (engine.job.rank + 1) * share)
    for _ in range(steps):
        engine.backward(engine(inputs[rows], targets[rows]))
        engine.step()
    write_events(engine, [("accuracy", 0.25, engine.global_samples)])
    engine.destroy()
    engine.job.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize(("ranks", "files"), [("first", 1), ("all", 2)])
def test_each_step_is_a_line_on_the_ranks_that_write(
    ranks: str, files: int, tmp_path: Path
) -> None:
    section = {"output_path": str(tmp_path), "job_name": "run", "ranks": ranks}
    run_distributed(train, 2, section)
    written = sorted((tmp_path / "run").iterdir())
    assert [path.name for path in written] == [f"rank{rank}.jsonl" for rank in range(files)]
    for path in written:
        rows = lines(path)
        assert [row["samples"] for row in rows] == [4, 8, 12]
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert [row["lr"] for row in rows] == [0.5] * 3
        assert rows[-1]["accuracy"] == 0.25
        assert all(row["gradient_norm"] > 0 for row in rows)
        assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    # what is the same on all ranks is written alike
    losses = [[row["train_loss"] for row in lines(path)] for path in written]
    assert all(each == losses[0] for each in losses)


def test_a_file_is_continued_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    for value in (1.0, float("nan")):
        writer = JsonLinesWriter(tmp_path / "a.jsonl")
        writer.write([Event("Train/Samples/loss", value, 4)])
        writer.close()
    assert lines(tmp_path / "a.jsonl") == [
        {"samples": 4, "loss": 1.0},
        {"samples": 4, "loss": None},
    ]
