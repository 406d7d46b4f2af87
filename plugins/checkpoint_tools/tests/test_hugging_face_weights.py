"""Weights go to Transformers and come from there, whole models never being on one rank."""

from __future__ import annotations

import json
import struct
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_checkpoint_tools import export, import_weights, load_pretrained
from drivetrain_checkpoint_tools.consolidated import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import drivetrain
from drivetrain.checkpoint.format.safetensors_file import read_header
from drivetrain.checkpoint.format.storage import LocalStorage
from drivetrain.checkpoint.opening import opened
from drivetrain.engine.engine import Engine
from drivetrain.errors import CheckpointError
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed
from drivetrain.testing.sharded import ShardedStates


def gpt2(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=19, n_positions=8))


def engine_of(module: nn.Module, **changes: Any) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=module,
        config={
            "train_batch_size": 6,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
            **changes,
        },
        registry=Registry.installed().with_plugins(ShardedStates),
    )
    return engine


BF16 = {"bf16": {"enabled": True}}
SHARDED = {"plugins": {"sharded_states": True}}


def trained_and_saved(folder: str, changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine = engine_of(gpt2(1), **changes)
    tokens = torch.arange(16).reshape(2, 8) % 19
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    engine.save_checkpoint(folder)
    state = {name: value.clone() for name, value in engine.module_state_dict().items()}
    engine.destroy()
    return state


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("limit", [1 << 30, 2_000])
def test_transformers_loads_what_is_exported(tmp_path: Path, dtype: str, limit: int) -> None:
    state = run_distributed(trained_and_saved, 3, str(tmp_path / "run"), {**BF16, **SHARDED})[0]
    gpt2(1).config.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_bytes()
    with opened(str(tmp_path / "run")) as stored:
        names = export(
            stored, str(tmp_path / "out"), dtype=dtype, max_shard_bytes=limit, config=config
        )
    assert (len(names) > 1) == (limit < 1 << 30)
    model, info = GPT2LMHeadModel.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    target = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for name, value in model.state_dict().items():
        if dtype == "bf16":
            assert torch.equal(value.bfloat16(), state[name])
        else:  # from masters, of which the parameters are rounded copies
            assert torch.equal(value, value.to(target).float())
            assert torch.equal(value.bfloat16(), state[name]) or dtype == "fp16"
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert {t.dtype for t in load_file(file).values()} == {target}
        assert file.stat().st_size < limit + 4_000


@pytest.mark.parametrize(("world", "changes"), [(1, {}), (2, {**BF16, **SHARDED})], ids=["1", "2"])
def test_a_tied_parameter_is_there_under_each_of_its_names(
    tmp_path: Path, world: int, changes: dict[str, Any]
) -> None:
    run_distributed(trained_and_saved, world, str(tmp_path / "run"), changes)
    state = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "run")
    gpt2(2).load_state_dict(state, strict=True)
    first, other = "transformer.wte.weight", "lm_head.weight"
    assert state[first] is state[other]
    for safe, read in ((False, partial(torch.load, weights_only=True)), (True, load_file)):
        folder = tmp_path / f"safe {safe}"
        convert_zero_checkpoint_to_fp32_state_dict(
            tmp_path / "run", str(folder), safe_serialization=safe
        )
        (file,) = folder.iterdir()
        written = read(file)
        assert written.keys() == gpt2(2).state_dict().keys()
        for name, value in written.items():
            assert torch.equal(value, state[name]), name
        assert safe or written[first].data_ptr() == written[other].data_ptr()


def filled(folder: str, changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every parameter and master after loading; a rank's part of what it holds a part of."""
    engine = engine_of(gpt2(2), **changes)
    load_pretrained(engine, folder)
    model = gpt2(3)
    model.load_state_dict(engine.module_state_dict())
    for fragment in engine.states.fragments():
        if fragment.kind == "master":
            flat = fragment.read()
            expected = dict(gpt2(1).named_parameters())[fragment.name]
            for box in fragment.boxes:
                assert torch.equal(box.of_storage(flat), box.of(expected))
    engine.destroy()
    return dict(model.state_dict())


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("changes", [{}, {**BF16, **SHARDED}], ids=["fp32", "bf16 sharded"])
@pytest.mark.parametrize("size", ["5GB", "1KB"])
def test_an_engine_is_filled_straight_from_files_of_transformers(
    tmp_path: Path, changes: dict[str, Any], world: int, size: str
) -> None:
    gpt2(1).save_pretrained(tmp_path, max_shard_size=size)
    dtype = torch.bfloat16 if "bf16" in changes else torch.float32
    for found in run_distributed(filled, world, str(tmp_path), changes):
        for name, value in gpt2(1).state_dict().items():
            assert torch.equal(found[name], value.to(dtype).float()), name


def test_imported_weights_are_a_checkpoint_for_the_module_alone(tmp_path: Path) -> None:
    gpt2(1).save_pretrained(tmp_path / "hub")
    import_weights(str(tmp_path / "hub"), str(tmp_path / "run"))
    engine = engine_of(gpt2(2))
    with pytest.raises(CheckpointError, match="which load_module_only=True takes"):
        engine.load_checkpoint(tmp_path / "run")
    engine.load_checkpoint(tmp_path / "run", load_module_only=True)
    for name, value in gpt2(1).state_dict().items():
        assert torch.equal(engine.module.state_dict()[name], value)
    engine.destroy()


# -- what is refused -------------------------------------------------------------------------------


def refusal(folder: Path, model: nn.Module | None = None) -> str:
    engine = engine_of(model or nn.Linear(2, 3))
    try:
        with pytest.raises(CheckpointError) as caught:
            load_pretrained(engine, str(folder))
    finally:
        engine.destroy()
    return str(caught.value)


def test_names_that_differ_are_listed(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3, 2), "other": torch.ones(3)}, tmp_path / "model.safetensors")
    assert "they lack bias" in refusal(tmp_path)
    assert "they have other, which the module lacks" in refusal(
        tmp_path, nn.Linear(2, 3, bias=False)
    )


def test_names_may_be_translated(tmp_path: Path) -> None:
    weights = {"model.weight": torch.rand(3, 2), "model.bias": torch.rand(3)}
    save_file(weights, tmp_path / "model.safetensors")
    engine = engine_of(nn.Linear(2, 3))
    load_pretrained(engine, str(tmp_path), rename=lambda name: f"model.{name}")
    assert torch.equal(engine.module.weight, weights["model.weight"])
    engine.destroy()


def test_another_shape_is_named(tmp_path: Path) -> None:
    weights = {"weight": torch.ones(2, 2), "bias": torch.ones(3)}
    save_file(weights, tmp_path / "model.safetensors")
    assert "weight (parameter) has shape [3, 2] in the model, but [2, 2]" in refusal(tmp_path)


def test_pickled_weights_are_refused_with_advice(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3, 2)}, tmp_path / "pytorch_model.bin")
    assert "weights in .bin files are pickles: convert them" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", ""])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, file: str) -> None:
    index = {"weight_map": {"weight": file, "bias": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which leads elsewhere" in refusal(tmp_path)


def header(described: object) -> bytes:
    text = json.dumps(described).encode()
    return struct.pack("<Q", len(text)) + text


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        b"\xff" * 8,
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 50) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\x80\x04K\x01",
        header({"a": {**GOOD, "shape": [1 << 60, 1 << 60]}}) + bytes(8),
        header({"a": {**GOOD, "data_offsets": [0, 1 << 60]}}) + bytes(8),
        header({"a": {**GOOD, "data_offsets": [-8, 0]}}) + bytes(8),
        header({"a": {**GOOD, "shape": [-2]}}) + bytes(8),
        header({"a": {**GOOD, "dtype": "OBJECT"}}) + bytes(8),
        header({"a": None}) + bytes(8),
        header({"a": GOOD}) + bytes(7),
    ],
)
def test_a_file_made_to_harm_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(LocalStorage(str(tmp_path)), "model.safetensors")


def test_exporting_into_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    gpt2(1).save_pretrained(tmp_path / "hub")
    import_weights(str(tmp_path / "hub"), str(tmp_path / "run"))
    with opened(str(tmp_path / "run")) as stored, pytest.raises(CheckpointError, match="not empty"):
        export(stored, str(tmp_path / "hub"))
