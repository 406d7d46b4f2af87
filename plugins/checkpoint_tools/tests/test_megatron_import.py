"""Checkpoints of Megatron-DeepSpeed's come over whole, and weights go both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from drivetrain_checkpoint_tools import import_deepspeed
from drivetrain_checkpoint_tools.command import checkpoint
from megatron_files import (
    LAYERS,
    VOCABULARY,
    Weights,
    gated,
    gated_layers,
    learned,
    learned_layers,
    library,
    model_file,
    named,
    partition,
    write_pipeline,
    write_whole,
)
from safetensors.torch import load_file

from drivetrain.checkpoint.format.reading import read_whole
from drivetrain.checkpoint.opening import opened
from drivetrain.errors import CheckpointError

FAMILIES: dict[str, tuple[Any, Any]] = {
    "gated": (gated, gated_layers),
    "learned": (learned, learned_layers),
}


def tensors_of(run: Path, kind: str) -> Weights:
    with opened(str(run), None) as stored:
        keys = [name for k, name in stored.keys if k == kind]
        return {name: read_whole(stored.storage, stored.find(kind, name)) for name in keys}


def whole_of(family: str) -> Weights:
    """What one rank would have, without rows that fill up the vocabulary."""
    model, layers_of = FAMILIES[family]
    found = named(layers_of(model(), 0, 1))
    return {
        name: x[:VOCABULARY] if "word_embeddings" in name or "output" in name else x
        for name, x in found.items()
    }


def same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_tensor_parallel_ranks_become_whole(
    family: str, ranks: int, tmp_path: Path
) -> None:
    model, layers_of = FAMILIES[family]
    write_whole(tmp_path / "theirs", layers_of, model(), ranks)
    import_deepspeed(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    found = tensors_of(tmp_path / "ours", "parameter")
    if ranks == 1:  # nothing says that it is padded, so nothing is taken away
        found = {n: x[:VOCABULARY] if n in table_names(found) else x for n, x in found.items()}
    same(found, whole_of(family))


def table_names(weights: Weights) -> set[str]:
    return {name for name in weights if "word_embeddings" in name or "output" in name}


@pytest.mark.parametrize("stages", [1, 2])
def test_layers_of_a_pipeline_become_whole(stages: int, tmp_path: Path) -> None:
    write_pipeline(tmp_path / "theirs", gated_layers, gated(), 2, stages)
    import_deepspeed(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    found = tensors_of(tmp_path / "ours", "parameter")
    expected = whole_of("gated")
    assert torch.equal(
        found["4.self_attention.query_key_value.weight"],
        expected["language_model.encoder.layers.1.self_attention.query_key_value.weight"],
    )
    assert len(found) == len(expected)


def test_masters_and_moments_become_whole(tmp_path: Path) -> None:
    place = tmp_path / "theirs"
    place.mkdir()
    kinds = {"master": 1.0, "exp_avg": 2.0, "exp_avg_sq": 3.0}
    for rank in range(2):
        module = named(gated_layers(gated(), rank, 2))
        torch.save(
            model_file(
                {n: x.bfloat16() for n, x in module.items()},
                dp_world_size=2,
                param_shapes=[{n: x.shape for n, x in module.items()}],
            ),
            place / f"mp_rank_{rank:02d}_model_states.pt",
        )
        states = {
            kind: {n: x * factor for n, x in module.items()} for kind, factor in kinds.items()
        }
        with library():
            for shard, content in enumerate(partition(states, 2, 7)):
                file = f"bf16_zero_pp_rank_{shard}_mp_rank_{rank:02d}_optim_states.pt"
                torch.save({"optimizer_state_dict": content}, place / file)
    import_deepspeed(str(place), str(tmp_path / "ours"))
    whole = named(gated_layers(gated(), 0, 1))
    for kind, factor in kinds.items():
        same(tensors_of(tmp_path / "ours", kind), {n: x * factor for n, x in whole.items()})
    steps = tensors_of(tmp_path / "ours", "step")
    assert steps.keys() == whole.keys()
    assert set(map(int, steps.values())) == {7}


# -- both ways -------------------------------------------------------------------------------------


def invoke(*arguments: object) -> str:
    found = CliRunner().invoke(checkpoint, [str(argument) for argument in arguments])
    assert found.exit_code == 0, found.output + repr(found.exception)
    return found.output


@pytest.mark.parametrize("layout", ["whole", "pipeline"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_megatron_load_in_transformers(family: str, layout: str, tmp_path: Path) -> None:
    make, layers_of = FAMILIES[family]
    model = make()
    if layout == "whole":
        write_whole(tmp_path / "theirs", layers_of, model, 2)
    else:
        write_pipeline(tmp_path / "theirs", layers_of, model, 2, 2)
    model.config.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    invoke("from-megatron", tmp_path / "theirs", tmp_path / "out", "--config", config)
    loaded = type(model).from_pretrained(tmp_path / "out")
    same(dict(loaded.state_dict()), dict(model.state_dict()))
    tokens = torch.arange(6)[None]
    assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_transformers_are_those_of_megatron(
    family: str, ranks: int, tied: bool, tmp_path: Path
) -> None:
    make, layers_of = FAMILIES[family]
    model = make(tied) if family == "gated" else make()
    model.save_pretrained(tmp_path / "theirs")
    options = ("--ranks", ranks, "--vocabulary-multiple", 64 // ranks)
    invoke("to-megatron", tmp_path / "theirs", tmp_path / "out", *options)
    for rank in range(ranks):
        file = tmp_path / f"out/global_step0/mp_rank_{rank:02d}_model_states.pt"
        expected = named(layers_of(model, rank, ranks))
        if tied or family == "learned":
            expected.pop("language_model.output_layer.weight", None)
        same(torch.load(file, weights_only=True)["module"], expected)
    config = tmp_path / "theirs/config.json"
    invoke("from-megatron", tmp_path / "out", tmp_path / "back", "--config", config)
    same(
        load_file(tmp_path / "back/model.safetensors"),
        load_file(tmp_path / "theirs/model.safetensors"),
    )


# -- bad input -------------------------------------------------------------------------------------


def refusal(source: Path, tmp_path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_deepspeed(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "latest").exists()
    return str(caught.value)


def test_what_is_missing_or_differs_is_named(tmp_path: Path) -> None:
    place = write_whole(tmp_path / "a", gated_layers, gated(), 2)
    file = place / "mp_rank_01_model_states.pt"
    content = torch.load(file, weights_only=False)
    norm = "language_model.encoder.layers.0.input_layernorm.weight"
    row = "language_model.encoder.layers.0.self_attention.dense.weight"
    for change, text in (
        ({norm: content["module"][norm] + 1}, f"{norm} (parameter) should be the same"),
        ({row: content["module"][row][:3]}, f"parts of {row}"),
        ({"language_model.other.weight": torch.ones(2)}, "language_model.other.weight (parameter)"),
    ):
        torch.save({**content, "module": content["module"] | change}, file)
        assert text in refusal(tmp_path / "a", tmp_path)
    torch.save({**content, "checkpoint_version": 1.0}, place / "mp_rank_00_model_states.pt")
    assert "checkpoint_version 1.0 of Megatron" in refusal(tmp_path / "a", tmp_path)


def test_a_missing_layer_or_rank_is_named(tmp_path: Path) -> None:
    place = write_pipeline(tmp_path / "a", gated_layers, gated(), 2, 2)
    (place / f"layer_{LAYERS + 2:02d}-model_01-model_states.pt").unlink()
    assert "lacks layers of some tensor-parallel ranks" in refusal(tmp_path / "a", tmp_path)
    place = write_pipeline(tmp_path / "b", gated_layers, gated(), 2, 2)
    (place / "mp_rank_01_model_states.pt").unlink()
    assert "model-parallel ranks [0, 2, 3] only" in refusal(tmp_path / "b", tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = gated()
    model.save_pretrained(tmp_path / "theirs")
    run, theirs = CliRunner(), str(tmp_path / "theirs")
    found = run.invoke(checkpoint, ["to-megatron", theirs, str(tmp_path / "a"), "--ranks", "7"])
    assert "cannot be cut for 7 ranks" in str(found.exception)
    write_whole(tmp_path / "m", gated_layers, model, 2)
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    for key, value, text in (
        ("num_attention_heads", 5, "5 heads and 2 of keys"),
        ("num_attention_heads", 6, "which are not those of 6 heads"),
        ("vocab_size", 900, "and the config 900 tokens"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        arguments = [str(tmp_path / "m"), str(tmp_path / "b"), "--config"]
        found = run.invoke(checkpoint, ["from-megatron", *arguments, str(tmp_path / "config.json")])
        assert text in str(found.exception)
