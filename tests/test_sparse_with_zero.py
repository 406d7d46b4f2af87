"""Sparse attention at every stage of ZeRO, beside recomputation and over shared sequences."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "sparse_attention" / "tests"))

from sparse_models import engine_of, plain, tiny, train

RECOMPUTE = {"activation_checkpointing": {"recompute": "all"}}
SHARED = {"sequence_parallel_size": 2}
TILES = {"sequence_parallel": {"loss_tile": 6, "mlp_tile": 4}}
BIGBIRD = {"mode": "bigbird", "block": 4}
FIXED = {"mode": "fixed", "block": 4, "num_local_blocks": 3}
HEADS = {"mode": "bigbird", "block": 4, "different_layout_per_head": True}

# Model, batch, layout, stage, and what else is on. Ranks that share no sequence have equal batches.
CASES: list[tuple[str, str, dict[str, Any], int, dict[str, Any]]] = [
    ("llama", "padded", BIGBIRD, 1, RECOMPUTE | SHARED),
    ("gpt2", "plain", FIXED, 2, SHARED),
    ("qwen", "packed", FIXED, 3, RECOMPUTE | SHARED | TILES),
    ("bert", "padded", BIGBIRD, 3, SHARED),
    ("llama", "plain", FIXED, 0, SHARED),
    ("llama", "packed", HEADS, 3, RECOMPUTE),
    ("gpt2", "padded", BIGBIRD, 2, RECOMPUTE),
]


def trained() -> list[Any]:
    found = []
    for name, kind, layout, stage, others in CASES:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        engine = engine_of(tiny(name), sparse_attention=layout, zero_optimization=zero, **others)
        losses = train(engine, kind)
        weights = {n: p.clone() for n, p in engine.module_state_dict().items() if p.dim()}
        found.append((losses, weights))
        engine.destroy()
    return found


def test_every_stage_of_zero_trains_to_the_weights_of_the_whole_mask() -> None:
    for found in run_distributed(trained, 2):
        for (losses, weights), (name, kind, layout, *_) in zip(found, CASES, strict=True):
            model = tiny(name)
            wanted = plain(model, name, kind, layout)
            assert losses == pytest.approx(wanted, rel=1e-6), (name, kind)
            for key, value in model.state_dict().items():
                if key in weights:
                    torch.testing.assert_close(weights[key], value, rtol=1e-6, atol=1e-7)


def refused() -> list[str]:
    found = []
    for config in (
        {"sparse_attention": FIXED, **SHARED, "sequence_parallel": {"ring_size": 2}},
        {"sparse_attention": HEADS, **SHARED},
    ):
        with pytest.raises(ConfigError) as caught:
            engine_of(tiny("llama"), **config)
        found.append(str(caught.value))
    return found


def test_rings_and_layouts_of_single_heads_over_shared_sequences_are_refused() -> None:
    for ring, heads in run_distributed(refused, 2):
        assert "sequence_parallel.ring_size: ranks of a ring compute attention themselves" in ring
        assert "sparse_attention.different_layout_per_head: ranks share out heads (sp)" in heads
