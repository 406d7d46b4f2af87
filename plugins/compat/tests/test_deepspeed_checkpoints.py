"""Checkpoints that DeepSpeed has written, through the same call and the same commands."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import deepspeed
import pytest
import torch
from click.testing import CliRunner
from deepspeed._commands import consolidate, universal
from deepspeed.utils.zero_to_fp32 import (
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)

from drivetrain.errors import CheckpointError

FILES = Path(__file__).parents[2] / "checkpoint_tools" / "tests" / "deepspeed_files"

CONFIG = {
    "train_batch_size": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
}


def model():
    """That of ``deepspeed_files/make_files.py``."""
    spec = importlib.util.spec_from_file_location("make_files", FILES / "make_files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(5)
    return module.Model()


def engine_of(module):
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    return deepspeed.initialize(model=module, model_parameters=groups, config=CONFIG)[0]


def expected(name):
    """Weights by the converted universal files, which are plain tensors."""
    found = torch.load(FILES / f"u1/global_step3/zero/{name}/fp32.pt", weights_only=True)
    return found["param"] if isinstance(found, dict) else found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_of_deepspeed_loads_through_the_same_call(stage, tmp_path):
    shutil.copytree(FILES / f"z{stage}", tmp_path / "run")
    engine = engine_of(model())
    # At stage 0 DeepSpeed does not name the parameters of several groups of its optimizer.
    path, _ = engine.load_checkpoint(tmp_path / "run", load_optimizer_states=stage > 0)
    assert Path(path) == tmp_path / "run" / "global_step3"
    assert engine.global_steps == 3
    weights = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "run"))
    for name, value in engine.module.state_dict().items():  # a tied one under both names
        torch.testing.assert_close(value.to(weights[name].dtype), weights[name])
    model().load_state_dict(weights, strict=True)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["global_step3", "latest"]
    engine.destroy()


def test_a_universal_checkpoint_loads_by_its_tag(tmp_path):
    shutil.copytree(FILES / "u1", tmp_path / "run")
    engine = engine_of(model())
    engine.load_checkpoint(tmp_path / "run", tag="global_step3")
    for name in ("hidden.weight", "norm.bias"):
        torch.testing.assert_close(engine.module.get_parameter(name).detach(), expected(name))
    engine.destroy()


def test_a_damaged_one_is_refused_by_name(tmp_path):
    shutil.copytree(FILES / "z1", tmp_path / "run")
    for path in (tmp_path / "run").rglob("*rank_1*optim_states.pt"):
        path.unlink()
    engine = engine_of(model())
    with pytest.raises(CheckpointError, match=r"optimizer states of ranks \[0\] only"):
        engine.load_checkpoint(tmp_path / "run")
    assert not (tmp_path / "run" / ".from_deepspeed").exists()
    engine.destroy()


def test_weights_load_into_a_plain_module():
    weights = get_fp32_state_dict_from_zero_checkpoint(str(FILES / "z1"), "global_step3")
    torch.testing.assert_close(weights["hidden.weight"], expected("hidden.weight"))
    loaded = load_state_dict_from_zero_checkpoint(model(), str(FILES / "z1"))
    torch.testing.assert_close(loaded.hidden.weight.detach(), expected("hidden.weight"))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["pytorch_model.bin"]),
        (["--safe_serialization"], ["model.safetensors"]),
        (
            ["--max_shard_size", "100"],
            ["pytorch_model.bin.index.json"],
        ),
    ],
)
def test_zero_to_fp32_writes_the_weights_of_both_kinds(options, names, tmp_path):
    engine = engine_of(model())
    engine.save_checkpoint(tmp_path / "ours")
    for source in (FILES / "z1", tmp_path / "ours"):
        target = tmp_path / f"out-{source.name}"
        done = CliRunner().invoke(consolidate.main, [str(source), str(target), *options])
        assert done.exit_code == 0, done.output
        assert set(names) <= {path.name for path in target.iterdir()}
    if options[:1] == ["--max_shard_size"]:
        index = json.loads((tmp_path / "out-ours" / names[0]).read_text())["weight_map"]
        assert len(set(index.values())) > 1
        read = torch.load(tmp_path / "out-ours" / index["back.bias"], weights_only=True)
        assert torch.equal(read["back.bias"], engine.module.back.bias)
    if names == ["pytorch_model.bin"]:
        state = torch.load(tmp_path / "out-ours" / names[0], weights_only=True)
        assert torch.equal(state["hidden.weight"], engine.module.hidden.weight)
    done = CliRunner().invoke(consolidate.main, [str(FILES / "z1"), str(target)])
    assert "is not empty" in done.output
    engine.destroy()


def test_ds_to_universal_converts_theirs_and_says_that_ours_need_nothing(tmp_path):
    out = tmp_path / "run" / "step3"
    arguments = ["--input_folder", str(FILES / "z1" / "global_step3"), "--output_folder", str(out)]
    done = CliRunner().invoke(universal.main, arguments)
    assert done.exit_code == 0, done.output
    engine = engine_of(model())
    engine.load_checkpoint(tmp_path / "run")
    assert engine.global_steps == 3
    engine.destroy()
    for folder in (tmp_path / "run", out):
        arguments = ["--input_folder", str(folder), "--output_folder", str(tmp_path / "x")]
        assert "use it as it is" in CliRunner().invoke(universal.main, arguments).output
