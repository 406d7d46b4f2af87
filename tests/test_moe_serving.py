"""Experts in host memory, and experts shared out over ranks, generate what a whole model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_inference import SamplingParams, serve
from safetensors.torch import save_file

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


def generated(config: dict[str, Any], folder: str = "") -> tuple[list[Any], int, int]:
    with serve(folder or model(), {"inference": SECTION, **config}) as engine:
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
    both = {**shared, "moe": {"cached_experts": 1}}
    for found, held, _ in run_distributed(generated, 2, both):
        same(found, expected)
        assert held == 0
