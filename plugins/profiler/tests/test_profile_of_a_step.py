"""One step of an engine is profiled, whatever trains around it, and nothing stays behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_profiler.plugin import CommsLogger, FlopsProfilerOfSteps
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.testing import PluginConformance, run_distributed


class TestFlopsProfiler(PluginConformance):
    plugin = FlopsProfilerOfSteps
    config = {"flops_profiler": {"enabled": True, "profile_step": 2}}


class TestCommsLogger(PluginConformance):
    plugin = CommsLogger
    config = {"comms_logger": {"prof_ops": ["all_reduce"], "prof_all": False}}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def train(config: dict[str, Any], steps: int = 4, by_hand: bool = False) -> list[torch.Tensor]:
    """Two micro-batches a step, with an evaluation between them."""
    full = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        **config,
    }
    engine, *_ = drivetrain.initialize(model=net(), config=full)
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(2 * steps):
        loss = engine(inputs).square().mean()
        if by_hand:
            loss.backward()
        else:
            engine.backward(loss)
        engine.step()
        engine.eval()
        with torch.no_grad():
            engine(inputs)
        engine.train()
    left = [m for m in engine.module.modules() if m._forward_pre_hooks]
    weights = [p.detach().clone() for p in engine.module.parameters()]
    engine.destroy()
    engine.job.close()
    return [*weights, torch.tensor(float(len(left)))]


def profiled(path: str, profile_step: int, by_hand: bool) -> tuple[list[Any], list[Any]]:
    section = {"enabled": True, "profile_step": profile_step, "output_file": path}
    return train({}), train({"flops_profiler": section}, by_hand=by_hand)


@pytest.mark.parametrize("profile_step", [0, 2])
def test_a_step_is_profiled_and_training_is_the_same(tmp_path: Path, profile_step: int) -> None:
    file = tmp_path / "deep" / "profile.txt"
    for plain, found in run_distributed(profiled, 2, str(file), profile_step, False):
        for ours, reference in zip(found, plain, strict=True):
            assert torch.equal(ours, reference)
    text = file.read_text("utf-8")
    assert text.startswith(f"profile of step {profile_step + 1}, 2 micro-batches\n")
    macs = 2 * 3 * (4 * 8 + 8 * 2)  # two micro-batches; evaluations between them are not counted
    assert f"{macs} MACs\n" in text
    # Of matrices, two micro-batches; the first layer computes no gradient of its inputs.
    row = next(line for line in text.splitlines() if "(0): Linear" in line)
    weights, biases = 2 * 2 * 3 * 4 * 8, 2 * 3 * 8
    assert row.endswith(f"backward {weights + biases} FLOPs")
    assert "2 (dp 2)" in text
    assert "samples/s" in text


def test_a_file_that_cannot_be_written_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    section = {"enabled": True, "output_file": str(tmp_path / "file" / "below")}
    train({"flops_profiler": section})
    assert "the profile cannot be written" in caplog.text
    assert "profile of step 2" in capsys.readouterr().out


def test_a_script_that_calls_backward_itself_is_told_so(tmp_path: Path) -> None:
    file = tmp_path / "profile.txt"
    run_distributed(profiled, 1, str(file), 1, True)
    assert "not seen: the script calls loss.backward() itself" in file.read_text("utf-8")


def test_a_run_that_is_resumed_beyond_the_step_is_not_profiled(tmp_path: Path) -> None:
    file = tmp_path / "profile.txt"
    run_distributed(resumed, 1, str(tmp_path), str(file))
    assert not file.exists()


def resumed(folder: str, file: str) -> None:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    engine, *_ = drivetrain.initialize(model=net(), config=config)
    for _ in range(3):
        engine.backward(engine(torch.ones(3, 4)).square().mean())
        engine.step()
    engine.save_checkpoint(folder)
    engine.destroy()
    section = {"enabled": True, "profile_step": 1, "output_file": file}
    engine, *_ = drivetrain.initialize(model=net(), config={**config, "flops_profiler": section})
    engine.load_checkpoint(folder)
    for _ in range(3):
        engine.backward(engine(torch.ones(3, 4)).square().mean())
        engine.step()
    engine.job.close()


@pytest.mark.parametrize(("steps", "said"), [(2, 1), (4, 0)])
def test_a_step_that_never_comes_is_told(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, steps: int, said: int
) -> None:
    section = {"enabled": True, "profile_step": 2, "output_file": str(tmp_path / "profile.txt")}
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "flops_profiler": section,
    }
    engine, *_ = drivetrain.initialize(model=net(), config=config)
    for _ in range(steps):
        engine.backward(engine(torch.ones(3, 4)).square().mean())
        engine.step()
    engine.job.close()
    assert (
        caplog.text.count("profile_step is 2, but this run ended before it (in its step 2)") == said
    )
    assert (tmp_path / "profile.txt").exists() is not bool(said)


def test_an_operation_that_does_not_exist_is_refused() -> None:
    config = {
        "train_batch_size": 1,
        "comms_logger": {"prof_all": False, "prof_ops": ["all_reduce", "allreduce"]},
    }
    with pytest.raises(ConfigError, match="no collective is called 'allreduce'"):
        drivetrain.Plan.build(config, world_size=1)
