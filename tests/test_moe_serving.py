"""Experts in host memory, and experts shared out over ranks, generate what a whole model does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import drivetrain_moe
import pytest
import torch
from drivetrain_inference import SamplingParams, serve
from safetensors.torch import load_file, save_file

import drivetrain
from drivetrain.errors import CheckpointError, ConfigError
from drivetrain.testing import run_distributed

transformers = pytest.importorskip("transformers")

PROMPTS = [[3, 1, 4, 1, 5], [9] * 20, [2, 7]]
SECTION = {"block_size": 8, "max_batch_tokens": 16, "max_sequences": 8}
COMMON = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def model() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**COMMON)).eval()


def generated(
    config: dict[str, Any], folder: str = "", weights: str | None = None
) -> tuple[list[Any], int, int]:
    with serve(folder or model(), {"inference": SECTION, **config}, weights=weights) as engine:
        held = sum(p.numel() for n, p in engine.module.named_parameters() if "experts" in n)
        results = engine.generate(PROMPTS, SamplingParams(max_new_tokens=12, logprobs=1))
        forwards = [part.__dict__.get("forward") for part in engine.module.modules()]
        caches = [c for c in (getattr(one, "cache", None) for one in forwards) if c is not None]
    found = [(r.tokens, [place.chosen for place in r.logprobs]) for (r,) in results]
    return found, held, sum(cache.hits for cache in caches)


def test_a_folder_or_checkpoint_with_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    config = transformers.MixtralConfig(**{**COMMON, "num_local_experts": 6})
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path)
    shared = {"expert_parallel": {"enabled": True}, "moe": {"cached_experts": 2}}
    by_config = r"experts.down_proj has shape \[6, 16, 24\] by its config, but \[4, 16, 24\] in its"
    with pytest.raises(ConfigError, match=by_config):
        generated(shared, str(tmp_path))
    weights = {name: value.clone() for name, value in model().state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    with torch.device("meta"):
        empty = transformers.MixtralForCausalLM(config)
    with pytest.raises(CheckpointError, match=r"\[6, 16, 24\].* \[4, 16, 24\]"):
        serve(empty, {"inference": SECTION, **shared}, weights=tmp_path / "weights.safetensors")


@pytest.mark.long
def test_experts_over_ranks_of_tensor_parallelism_generate_the_same() -> None:
    pytest.importorskip("drivetrain_tensor")
    expected, whole, _ = generated({})
    shared = {
        "tensor_parallel": {"autotp_size": 2},
        "expert_parallel": {"enabled": True, "autoep_size": 2},
        "moe": {"over_tensor": True},
    }
    for found, held, _ in run_distributed(generated, 2, shared):
        same(found, expected)
        assert held == whole // 2


def same(found: list[Any], expected: list[Any]) -> None:
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(found, expected, strict=True):
        assert tokens == wanted
        assert logprobs == pytest.approx(wanted_logprobs, abs=1e-4)


def test_experts_in_host_memory_or_on_two_ranks_generate_the_same(tmp_path: Path) -> None:
    expected, whole, _ = generated({})
    model().save_pretrained(tmp_path)
    shared = {"expert_parallel": {"enabled": True}, "moe": {"cached_experts": 2}}
    found, held, hits = generated(shared, str(tmp_path))
    same(found, expected)
    assert held == 0
    assert hits > 0
    shared = {"expert_parallel": {"enabled": True, "autoep_size": 2}}
    for found, held, _ in run_distributed(generated, 2, shared):
        same(found, expected)
        assert held == whole // 2
    # The folder has each expert by itself, and the model all of a layer in one tensor.
    assert any(".experts.3.w2.weight" in name for name in load_file(tmp_path / "model.safetensors"))
    both = {**shared, "moe": {"cached_experts": 1}}
    for found, held, _ in run_distributed(generated, 2, both, str(tmp_path), str(tmp_path)):
        same(found, expected)
        assert held == 0


def trained_from(folder: str) -> tuple[int, dict[str, torch.Tensor]]:
    empty = model()
    for part in empty.modules():  # buffers that are computed keep their values
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, torch.nn.Parameter(parameter.to("meta")))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "expert_parallel": {"enabled": True, "autoep_size": 2},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = drivetrain.initialize(model=empty, config=config, weights=folder)
    held = engine.module.model.layers[0].mlp.experts.num_experts
    state = engine.module_state_dict()
    engine.destroy()
    return held, state


def test_training_begins_from_a_folder_with_each_expert_by_itself(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    expected = model().state_dict()
    for held, state in run_distributed(trained_from, 2, str(tmp_path)):
        assert held == 2
        assert set(state) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=0)


def test_experts_in_a_folder_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    damaged = next(
        name for name in weights if name.endswith("layers.1.block_sparse_moe.experts.2.w1.weight")
    )
    weights[damaged] = torch.zeros(3, 16)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.experts.gate_up_proj cannot be made"):
        generated({}, str(tmp_path), str(tmp_path))


def test_a_model_that_was_upcycled_is_served_as_it_is() -> None:
    own = {key: value for key, value in COMMON.items() if "expert" not in key}
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**own)).eval()
    mixture = copy.deepcopy(dense)
    drivetrain_moe.upcycle(mixture, 4)
    found = []
    for each in (dense, mixture):
        with serve(each, {"inference": SECTION}) as engine:
            results = engine.generate(PROMPTS, SamplingParams(max_new_tokens=6))
            found.append([result.tokens for (result,) in results])
    assert found[0] == found[1]
