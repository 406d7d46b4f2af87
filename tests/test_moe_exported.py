"""A Mixtral trains with shared-out experts at stage 3, and Transformers loads the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import drivetrain
from drivetrain.testing import run_distributed

transformers = pytest.importorskip("transformers")


def build() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,  # the model adds its own balancing loss
        router_aux_loss_coef=0.1,
    )
    return transformers.MixtralForCausalLM(config)


def words(step: int, shard: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + shard)
    return torch.randint(3, 64, (2, 9), generator=generator)


def train_and_export(folder: str) -> tuple[list[float], list[float]]:
    engine, *_ = drivetrain.initialize(
        model=build(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.3}},
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
        ids = words(step, engine.job.rank)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.save_16bit_model(folder, "model.safetensors")
    if engine.job.rank == 0:
        build().config.save_pretrained(folder)
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=words(9, 0)).logits.flatten().tolist()
    engine.destroy()
    return losses, logits


def test_a_mixtral_trains_unchanged_and_goes_back_to_transformers(tmp_path: Path) -> None:
    model, expected = build(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(3):
        both = [model(input_ids=words(step, s), labels=words(step, s)).loss for s in range(2)]
        optimizer.zero_grad()
        torch.stack(both).mean().backward()
        optimizer.step()
        expected.append([loss.item() for loss in both])
    ranks = run_distributed(train_and_export, 2, str(tmp_path))
    for shard, (losses, _) in enumerate(ranks):
        assert losses == pytest.approx([both[shard] for both in expected], rel=1e-5)
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded.eval()
    with torch.no_grad():
        logits = loaded(input_ids=words(9, 0)).logits.flatten()
        trained = model.eval()(input_ids=words(9, 0)).logits.flatten()
    for _, found in ranks:
        torch.testing.assert_close(torch.tensor(found), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, trained, rtol=1e-3, atol=1e-4)
