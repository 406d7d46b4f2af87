"""Architectures of Transformers train at stage 3 to plain torch, none of them known by name."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

import drivetrain_zero
import pytest
import torch
from torch import nn
from zero_harness import assert_parameters_equal, config, whole_parameters

import drivetrain
from drivetrain.testing import run_distributed

os.environ["HF_HUB_OFFLINE"] = "1"


def words(text: str) -> list[str]:
    return text.split()


DECODERS = words("""
    biogpt bloom cohere cohere2 diffllama ernie4_5 exaone4 falcon gemma gemma2 gemma3_text glm glm4
    gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite helium llama mamba mistral mpt nemotron olmo
    olmo2 openai-gpt opt persimmon phi phi3 qwen2 qwen3 rwkv smollm3 stablelm starcoder2 xglm
""")
EXPERTS = words("""
    deepseek_v2 deepseek_v3 dots1 flex_olmo glm4_moe gpt_oss granitemoe hunyuan_v1_moe jamba minimax
    mixtral olmoe phimoe qwen2_moe qwen3_moe
""")
ENCODERS = words("albert bert convbert deberta-v2 distilbert electra modernbert mpnet roberta")
PAIRS = words("bart mbart marian mt5 pegasus")

ARCHITECTURES = {
    **dict.fromkeys([*DECODERS, *EXPERTS], "AutoModelForCausalLM"),
    **dict.fromkeys(ENCODERS, "AutoModelForMaskedLM"),
    **dict.fromkeys(PAIRS, "AutoModelForSeq2SeqLM"),
}

VOCABULARY = 64

TINY_SIZES = {
    0.0: """
        hidden_dropout attention_dropout attention_probs_dropout_prob hidden_dropout_prob dropout
        resid_pdrop embd_pdrop attn_pdrop emb_pdrop activation_dropout dropout_rate dropout_prob
        encoder_layerdrop decoder_layerdrop layerdrop router_jitter_noise input_jitter_noise
    """,
    1: "n_shared_experts first_k_dense_replace n_group topk_group num_hidden_groups",
    2: """
        num_hidden_layers num_attention_heads num_key_value_heads n_head n_layer n_heads n_layers
        num_layers num_heads encoder_layers decoder_layers encoder_attention_heads
        decoder_attention_heads num_experts_per_tok
    """,
    4: """
        num_local_experts num_experts n_routed_experts moe_num_experts rotary_dim qk_rope_head_dim
        qk_nope_head_dim
    """,
    8: "head_dim d_kv v_head_dim q_lora_rank kv_lora_rank",
    16: """
        hidden_size n_embd d_model dim embedding_size word_embed_proj_dim moe_intermediate_size
        shared_expert_intermediate_size
    """,
    32: """
        intermediate_size n_inner d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size
        hidden_dim max_position_embeddings n_positions max_seq_len
    """,
}
TINY: dict[str, Any] = {
    **{key: size for size, keys in TINY_SIZES.items() for key in words(keys)},
    "vocab_size": VOCABULARY,
    "attention_types": [[["global"], 2]],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
}
"""What makes a model tiny, in the words of its config."""

STEPS = 2


def build(name: str) -> nn.Module:
    import transformers

    kind = transformers.CONFIG_MAPPING[name]
    known = {*inspect.signature(kind.__init__).parameters, *kind.attribute_map}
    settings = kind(**{key: value for key, value in TINY.items() if key in known})
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, ARCHITECTURES[name]).from_config(settings)
    return model.train()


def tokens(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(3, VOCABULARY, (1, 8), generator=generator)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def train(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = build(name)
    settings = config(3, gradient_clipping=1.0, train_micro_batch_size_per_gpu=1)
    engine, *_ = drivetrain.initialize(model=model, optimizer=sgd, config=settings)
    losses = []
    for step in range(STEPS):
        ids = tokens(step, engine.job.rank)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    parameters = dict(whole_parameters(engine))
    engine.destroy()
    return losses, parameters


def plain(name: str, ranks: int) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    model, losses = build(name), []
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        batches = [tokens(step, rank) for rank in range(ranks)]
        terms = [model(input_ids=ids, labels=ids).loss for ids in batches]
        optimizer.zero_grad()
        torch.stack(terms).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append([term.item() for term in terms])
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_trains_at_stage_3(name: str) -> None:
    losses, parameters = plain(name, 2)
    for rank, (found, trained) in enumerate(run_distributed(train, 2, name)):
        assert found == pytest.approx([step[rank] for step in losses], rel=1e-5)
        assert_parameters_equal(trained, parameters)


def test_no_architecture_is_named_in_the_code() -> None:
    sources = Path(drivetrain_zero.__file__).parent.glob("*.py")
    text = " ".join(path.read_text("utf-8") for path in sources).lower()
    names = [name for name in (*ARCHITECTURES, "transformers") if len(name) > 3]
    assert not [name for name in names if re.search(rf"\b{name}", text)]
    assert len(ARCHITECTURES) >= 30
    assert len(EXPERTS) >= 8
