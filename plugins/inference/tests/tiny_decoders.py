"""Small decoders of differing architecture, with random weights."""

from __future__ import annotations

import torch
import transformers

VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    "initializer_range": 0.2,
}  # fmt: skip
SINKS = {"head_dim": 8, "num_local_experts": 4, "sliding_window": 16}
KINDS = {
    "llama": (transformers.LlamaConfig, {}),
    "mistral, sliding window": (transformers.MistralConfig, {"sliding_window": 11}),
    "gemma2, soft caps": (transformers.Gemma2Config, {"head_dim": 8, "sliding_window": 9}),
    "gpt-oss, sinks and experts": (transformers.GptOssConfig, SINKS),
    "qwen2, biases, tied": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3, normed heads": (transformers.Qwen3Config, {"head_dim": 8}),
    "phi3, joined": (transformers.Phi3Config, {}),
    "olmo2": (transformers.Olmo2Config, {}),
    "qwen3 moe": (transformers.Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "llama, one head of keys": (transformers.LlamaConfig, {"num_key_value_heads": 1}),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}),
    "starcoder2": (transformers.Starcoder2Config, {"use_bias": True}),
    "cohere": (transformers.CohereConfig, {}),
    "gpt-neox": (transformers.GPTNeoXConfig, {}),
    "bloom, alibi": (transformers.BloomConfig, {"n_layer": 2, "n_head": 4}),
    "bloom, alibi of 6 heads": (
        transformers.BloomConfig,
        {"hidden_size": 48, "n_layer": 2, "n_head": 6},
    ),
    "mpt, alibi": (
        transformers.MptConfig,
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    ),
    "falcon, alibi": (transformers.FalconConfig, {"alibi": True, "bias": True}),
    "falcon, rotary, shared heads": (
        transformers.FalconConfig,
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
}
SUITE = (
    "llama",
    "mistral, sliding window",
    "gemma2, soft caps",
    "gpt-oss, sinks and experts",
    "bloom, alibi",
)


def decoder(kind: str = "llama", seed: int = 0, **options: object) -> torch.nn.Module:
    """A model of that kind, in float32."""
    config_type, own = KINDS[kind]
    config = config_type(**{**COMMON, **own, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():  # norms that do something, biases that are not 0
            if parameter.dim() == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def expected(model, prompt, tokens):
    """Greedy continuation by Transformers, its logits, and whether each choice is clear."""
    found = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    logits = torch.cat(found.logits).float()
    best = logits.topk(2, dim=1).values
    clear = (best[:, 0] - best[:, 1] > 1e-4).tolist()
    return found.sequences[0, len(prompt) :].tolist(), logits, clear
