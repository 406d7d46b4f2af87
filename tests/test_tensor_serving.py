"""Ranks that share a model's layers generate what one process generates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain_inference import SamplingParams, serve
from drivetrain_inference.scripts import init_inference
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed

PROMPTS = [[3, 1, 4, 1, 5], [9] * 20, [2, 7]]
SECTION = {"block_size": 8, "max_batch_tokens": 16, "max_sequences": 8}


def model(kind: str) -> torch.nn.Module:
    common = {"vocab_size": 60, "bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":  # joined projections with biases, tied head
            config = GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=64, **common)
            return GPT2LMHeadModel(config).eval()
        llama = LlamaConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, head_dim=4, max_position_embeddings=64, initializer_range=0.3,
            tie_word_embeddings=False, **common,
        )  # fmt: skip
        return LlamaForCausalLM(llama).eval()


def params() -> list[SamplingParams]:
    greedy = SamplingParams(max_new_tokens=16, logprobs=1)
    drawn = SamplingParams(max_new_tokens=16, temperature=1.2, seed=3, logprobs=1)
    return [greedy, drawn, SamplingParams(max_new_tokens=9, num_beams=3)]


def generated(kind: str, config: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Tokens and log-probabilities of each result, and elements that this process keeps."""
    with serve(model(kind), config) as engine:
        size = sum(parameter.numel() for parameter in engine.module.parameters())
        results = engine.generate(PROMPTS, params())
        cache = engine.cache.keys[0].shape[1]
        engine.scheduler.blocks.check([])
    return [
        *((each.tokens, [place.chosen for place in each.logprobs]) for (each,) in results),
        (size, cache),
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_two_ranks_generate_the_tokens_of_one(kind: str) -> None:
    config = {"inference": SECTION}
    (*wanted, (whole, heads)) = generated(kind, config)
    for found in run_distributed(
        generated, 2, kind, {**config, "tensor_parallel": {"autotp_size": 2}}
    ):
        *results, (size, own_heads) = found
        assert size < 0.65 * whole
        assert own_heads == heads // 2
        for (tokens, logprobs), (expected, expected_logprobs) in zip(results, wanted, strict=True):
            assert tokens == expected
            assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)


def by_script() -> tuple[list[int], str]:
    """What a DeepSpeed script gets, and the refusal of a deadline."""
    engine = init_inference(
        model("llama"), dtype="fp32", tensor_parallel={"tp_size": 2}, max_tokens=64
    )
    try:
        engine.engine.add([1], SamplingParams(max_new_tokens=4), timeout=1.0)
        refusal = ""
    except ConfigError as error:
        refusal = str(error)
    row = engine.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=12)[0].tolist()
    engine.destroy()
    return row, refusal


def test_init_inference_shares_a_model_out() -> None:
    with serve(model("llama"), {"inference": SECTION}) as engine:
        (result,) = engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=12))[0]
    for row, refusal in run_distributed(by_script, 2):
        assert row == [*PROMPTS[0], *result.tokens]
        assert "timeout" in refusal
        assert "no common clock" in refusal
