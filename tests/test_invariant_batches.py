"""What a request gets is the same to the bit in every batch, with the kernels of the CPU."""

from __future__ import annotations

import pytest
import torch
from drivetrain_inference import SamplingParams, serve
from transformers import LlamaConfig, LlamaForCausalLM

PATTERN = [5, 17, 40, 2, 9]
PROMPTS = [PATTERN * 5, [3, 1, 4], [8, 9] * 7, list(range(20))]
SECTION = {
    "block_size": 4,
    "max_batch_tokens": 64,
    "max_sequences": 8,
    "batch_invariant": True,
    "prefix_caching": False,
}


def llama() -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("form", ["", "w8a8", "q4_1", "int8"])
def test_the_invariant_mode_gives_the_same_bits_in_every_batch(form: str) -> None:
    config = {**SECTION, "weight_format": form}
    params = SamplingParams(max_new_tokens=12, logprobs=3)
    with serve(llama(), {"inference": config}) as engine:
        together = engine.generate(PROMPTS, params)
        alone = [engine.generate([prompt], params)[0] for prompt in PROMPTS]
    assert [each[0].logprobs for each in together] == [each[0].logprobs for each in alone]
