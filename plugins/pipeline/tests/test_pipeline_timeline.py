"""The file with the timeline of the latest step."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tiny_models import MODELS, data

import drivetrain
from drivetrain.errors import DrivetrainError
from drivetrain.testing import run_distributed


def train(file: str, schedule: str, steps: int) -> str:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "pipeline": {"stages": 2, "schedule": schedule, "timeline": file},
    }
    torch.manual_seed(0)
    engine, *_ = drivetrain.initialize(model=MODELS["llama"](), config=config)
    try:
        for step in data(steps, 4, 1):
            engine.train_batch(iter([micro[0] for micro in step]))
    except DrivetrainError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def events(file: Path) -> list[dict[str, Any]]:
    found = json.loads(file.read_text())["traceEvents"]
    return [event for event in found if event["ph"] == "X"]


def test_the_latest_step_is_written_as_predicted_and_as_measured(tmp_path: Path) -> None:
    for schedule, passes in (("1f1b", "FB"), ("zb_v", "FIW")):
        file = tmp_path / f"{schedule}.json"
        assert run_distributed(train, 2, str(file), schedule, 2, timeout=200) == ["", ""]
        chunks = 4 if schedule == "zb_v" else 2
        for process in (0, 1):  # predicted, measured
            own = [event for event in events(file) if event["pid"] == process]
            every = {f"{k}{m}.{c}" for k in passes for m in range(4) for c in range(chunks)}
            assert Counter(event["name"] for event in own) == Counter(every)
        measured = {e["name"]: e for e in events(file) if e["pid"] == 1}
        # On one machine's clock: what a pass needs was finished before.
        for micro in range(4):
            first, then = measured[f"F{micro}.0"], measured[f"F{micro}.1"]
            assert first["tid"] != then["tid"]
            assert first["ts"] + first["dur"] <= then["ts"]


def refused(folders: list[str]) -> str:
    torch.manual_seed(0)
    section = {"stages": 2, "schedule": "fastest", "measured": "times.json"}
    config = {"train_micro_batch_size_per_gpu": 2, "pipeline": section}
    try:
        with contextlib.chdir(folders[int(os.environ["RANK"])]):
            drivetrain.initialize(model=MODELS["llama"](), config=config)
    except DrivetrainError as error:
        return str(error)
    return ""


def test_ranks_with_other_measured_times_are_told(tmp_path: Path) -> None:
    folders = [tmp_path / str(rank) for rank in range(2)]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        facts = {"forward": 1 + rank, "backward": 2, "activations": 1}
        times = {f"model.layers.{number}": facts for number in range(4)}
        (folder / "times.json").write_text(json.dumps(times))
    found = run_distributed(refused, 2, [str(folder) for folder in folders], timeout=200)
    assert all("times.json is another file on rank 1 than on rank 0" in text for text in found)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "absent" / "step.json"
    first, _ = run_distributed(train, 2, str(file), "1f1b", 1, timeout=200)
    assert first == f"pipeline.timeline: {file} cannot be written: No such file or directory"
