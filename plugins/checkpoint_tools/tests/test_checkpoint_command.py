"""``drivetrain checkpoint``: what it prints, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from drivetrain_checkpoint_tools import inspect, verify
from drivetrain_checkpoint_tools.command import checkpoint
from drivetrain_checkpoint_tools.exporting import parse_size
from safetensors.torch import load_file, save_file
from torch import nn

import drivetrain
from drivetrain.checkpoint.opening import opened
from drivetrain.errors import CheckpointError

RUN = CliRunner()


def invoke(*arguments: object) -> Result:
    return RUN.invoke(checkpoint, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    engine, *_ = drivetrain.initialize(
        model=nn.Linear(3, 2),
        config={
            "train_batch_size": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
            "bf16": {"enabled": True},
        },
    )
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 3, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
        engine.save_checkpoint(folder, client_state={"note": "x"})
    engine.destroy()
    return folder


def damaged(run: Path, folder: Path) -> Path:
    """A copy of the latest checkpoint with one flipped bit in the first tensor."""
    for path in (run / "global_step2").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 2] ^= 16
    path.write_bytes(data)
    return folder


def test_the_command_is_found_by_its_name(run: Path) -> None:
    command = [sys.executable, "-m", "drivetrain.cli", "checkpoint", "verify", str(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "global_step2 is whole: 10 tensors of 1 ranks" in done.stdout


def test_verify_names_what_is_damaged(run: Path, tmp_path: Path) -> None:
    assert invoke("verify", run, "--tag", "global_step1").exit_code == 0
    result = invoke("verify", damaged(run, tmp_path))
    assert result.exit_code == 1
    assert "is damaged in" in result.output
    assert "bias (step)" in result.output


def test_verify_finds_every_flipped_bit_of_a_file(run: Path, tmp_path: Path) -> None:
    folder = damaged(run, tmp_path)
    good = next((run / "global_step2").glob("*.safetensors")).read_bytes()
    path = next(folder.glob("*.safetensors"))
    for at in range(0, len(good), 101):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with opened(str(folder)) as stored:
            assert len(verify(stored)) == 1, at


def test_inspect_shows_every_tensor(run: Path) -> None:
    result = invoke("inspect", run, "--values", "--hash")
    assert result.exit_code == 0, result.output
    assert "step: 2" in result.output
    assert "guarantee: resumes in the same layout: bitwise" in result.output
    facts = json.loads(invoke("inspect", run, "--json", "--values", "--hash").output)
    assert facts["client_state"] == {"note": "x"}
    tensors = {(row["kind"], row["name"]): row for row in facts["tensors"]}
    weight = tensors["parameter", "weight"]
    assert (weight["dtype"], weight["shape"], weight["nbytes"]) == ("BF16", [2, 3], 12)
    assert weight["values"]["non_finite"] == 0
    assert len(weight["values"]["sha256"]) == 64
    assert {kind for kind, _ in tensors} == {"parameter", "master", "exp_avg", "exp_avg_sq", "step"}
    with opened(str(run)) as stored:
        assert "values" not in {k for row in inspect(stored) for k in row.values}


def test_diff_counts_elements_and_says_how_far_apart_they_are(run: Path) -> None:
    same = invoke("diff", run / "global_step2", run)
    assert (same.exit_code, same.output) == (0, "the same: 10 tensors\n")
    result = invoke("diff", run / "global_step1", run / "global_step2", "--json")
    assert result.exit_code == 1
    found: dict[str, Any] = {f"{d['kind']} {d['name']}": d for d in json.loads(result.output)}
    assert found["step bias"]["largest"] == 1.0
    assert found["master weight"]["elements"] == 6
    assert found["master weight"]["largest"] == pytest.approx(0.1, abs=0.05)
    table = invoke("diff", run / "global_step1", run / "global_step2")
    assert "master      weight  values" in table.output


def test_export_and_import_go_round(run: Path, tmp_path: Path) -> None:
    result = invoke("export", run, tmp_path / "out", "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    assert "wrote 1 file with fp32 weights" in result.output
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in weights.items()} == {"weight": (2, 3), "bias": (2,)}
    result = invoke("import", tmp_path / "out", tmp_path / "back", "--tag", "hub")
    assert result.exit_code == 0, result.output
    difference = json.loads(invoke("diff", tmp_path / "back", run, "--json").output)
    only = {d["kind"] for d in difference if d["what"] == "only in B"}
    assert only == {"master", "exp_avg", "exp_avg_sq", "step"}
    assert {d["what"] for d in difference if d["kind"] == "parameter"} == {"F32 in A, BF16 in B"}


def test_a_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="is no checkpoint, and no folder of checkpoints"):
        invoke("verify", tmp_path, "--tag", "") and opened(str(tmp_path)).__enter__()


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2KiB", 2048), ("17", 17)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1", "0", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="is no size"):
        parse_size(text)
