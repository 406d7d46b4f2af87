"""Models train with shared-out experts at stage 3, and Transformers loads the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import drivetrain
from drivetrain.testing import run_distributed

transformers = pytest.importorskip("transformers")

DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": True,  # the model adds its own balancing loss
    "router_aux_loss_coef": 0.1,
}
MODELS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": DECODER,
    "Llama4ForCausalLM": {  # experts that compute a block of rows each
        **DECODER,
        "head_dim": 8,
        "intermediate_size_mlp": 24,
        "interleave_moe_layer_step": 1,
        "moe_layers": [0, 1],
        "attention_chunk_size": 16,
        "no_rope_layers": [1, 0],
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    },
    "SwitchTransformersForConditionalGeneration": {  # experts in dictionaries of modules
        "vocab_size": 64,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 2,
        "num_experts": 4,
        "expert_capacity": 18,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "dropout_rate": 0.0,
        "router_jitter_noise": 0.0,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    },
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = kind.config_class(**MODELS[name])
    config._attn_implementation = "eager"
    return kind(config)


def words(step: int, shard: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + shard)
    return torch.randint(3, 64, (2, 9), generator=generator)


def inputs(step: int, shard: int) -> dict[str, torch.Tensor]:
    return {"input_ids": words(step, shard), "labels": words(step, shard)}


def train_and_export(name: str, folder: str) -> tuple[list[float], torch.Tensor]:
    model = build(name)
    engine, *_ = drivetrain.initialize(
        model=model,
        # It has experts that the other rank keeps.
        optimizer=torch.optim.SGD(model.parameters(), lr=0.3),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "expert_parallel": {"enabled": True, "autoep_size": 2},
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        },
    )
    losses = []
    for step in range(3):
        loss = engine(**inputs(step, engine.job.rank)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.save_16bit_model(f"{folder}/file", "model.safetensors")
    state = engine.module_state_dict()
    if engine.job.rank == 0:
        build(name).config.save_pretrained(f"{folder}/file")
        engine.module.save_pretrained(f"{folder}/dict", state_dict=dict(state))  # it is emptied
    engine.load_module_state_dict(state)
    engine.eval()
    with torch.no_grad():
        logits = engine(**inputs(9, 0)).logits.clone()
    engine.destroy()
    return losses, logits


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_unchanged_and_goes_back_to_transformers(name: str, tmp_path: Path) -> None:
    model, expected = build(name), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(3):
        both = [model(**inputs(step, shard)).loss for shard in range(2)]
        optimizer.zero_grad()
        torch.stack(both).mean().backward()
        optimizer.step()
        expected.append([loss.item() for loss in both])
    ranks = run_distributed(train_and_export, 2, name, str(tmp_path))
    for shard, (losses, _) in enumerate(ranks):
        assert losses == pytest.approx([both[shard] for both in expected], rel=1e-5)
    with torch.no_grad():
        trained = model.eval()(**inputs(9, 0)).logits
    for way in ("file", "dict"):
        kind = getattr(transformers, name)
        loaded, about = kind.from_pretrained(
            tmp_path / way,
            dtype=torch.float32,
            output_loading_info=True,
            attn_implementation="eager",
        )
        assert not any(about.values()), about
        with torch.no_grad():
            logits = loaded.eval()(**inputs(9, 0)).logits
        torch.testing.assert_close(logits, trained, rtol=1e-3, atol=1e-4)
        for _, found in ranks:
            torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
