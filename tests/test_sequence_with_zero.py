"""Models of Transformers over parts of sequences, at every stage of ZeRO, beside recomputation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "sequence" / "tests"))

from sequence_composites import STEPS, alone, composite, examples
from sequence_models import LENGTH, engine_of, plain, tiny, train

Case = tuple[str, str, int, dict[str, Any]]

RECOMPUTE = {"activation_checkpointing": {"recompute": "all"}}
TILES = {"sequence_parallel": {"loss_tile": 6, "mlp_tile": 4, "norm_tile": 5}}
ANY_TILES = {"sequence_parallel": {"norm_tile": 5, "tiled_modules": {"*_proj": 5}}}
CHUNKS = {"sequence_parallel": {"loss_tile": 6, "chunk": 8}}
OFFLOAD = {"activation_checkpointing": {"recompute": "all", "cpu_checkpointing": True}}

# Every pair of stage, model, and what else is on.
CASES: list[Case] = [
    ("llama", "padded", 1, RECOMPUTE),
    ("gpt2", "plain", 2, TILES),
    ("llama", "packed", 3, RECOMPUTE | TILES),
    ("bert", "masked", 3, {}),
    ("gpt2", "padded", 3, TILES),
    ("qwen", "plain", 0, RECOMPUTE | TILES),
    ("llama", "padded", 1, ANY_TILES),
    ("qwen", "packed", 3, ANY_TILES),
    ("llama", "padded", 3, CHUNKS),
    ("qwen", "packed", 2, RECOMPUTE | CHUNKS),
    ("gpt2", "plain", 3, OFFLOAD | CHUNKS),
]


def trained(cases: list[Case]) -> list[Any]:
    found = []
    for name, kind, stage, others in cases:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config: dict[str, Any] = {"zero_optimization": zero, "sequence_parallel_size": 2, **others}
        engine = engine_of(tiny(name), **config)
        losses = train(engine, kind)
        weights = {n: p.clone() for n, p in engine.module_state_dict().items() if p.dim()}
        found.append((losses, weights))
        engine.destroy()
    return found


def test_every_stage_of_zero_trains_to_the_weights_of_one_process() -> None:
    for found in run_distributed(trained, 2, CASES):
        for (losses, weights), (name, kind, *_) in zip(found, CASES, strict=True):
            model = tiny(name)
            assert losses == pytest.approx(plain(model, kind, LENGTH), rel=1e-6), (name, kind)
            for key, value in model.state_dict().items():
                if key in weights:
                    torch.testing.assert_close(weights[key], value, rtol=1e-6, atol=1e-7)


COMPOSITES: list[tuple[str, int, dict[str, Any]]] = [
    ("t5", 3, {}),
    ("llava", 3, RECOMPUTE),
    ("bart", 2, RECOMPUTE),
    ("qwen", 3, CHUNKS),
]


def composites(cases: list[tuple[str, int, dict[str, Any]]]) -> list[list[float]]:
    found = []
    for name, stage, others in cases:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config: dict[str, Any] = {"zero_optimization": zero, "sequence_parallel_size": 2, **others}
        engine = engine_of(composite(name), **config)
        losses = []
        for step in range(STEPS[name]):
            losses.append(engine(**examples(name, step)).loss)
            engine.backward(losses[-1])
            engine.step()
        found.append([loss.item() for loss in losses])
        engine.destroy()
    return found


@pytest.mark.long
def test_models_of_two_sequences_or_modalities_train_at_stages_of_zero() -> None:
    expected = [alone(name)[0] for name, *_ in COMPOSITES]
    for found in run_distributed(composites, 2, COMPOSITES):
        for losses, wanted in zip(found, expected, strict=True):
            assert losses == pytest.approx(wanted, rel=1e-5)


CURVES = [
    (name, kind, stage)
    for name, kind in (
        ("llama", "packed"),
        ("qwen", "plain"),
        ("gpt2", "padded"),
        ("bert", "masked"),
    )
    for stage in range(4)
]
CURVE = 20
ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.01}


def curves(cases: list[tuple[str, str, int]]) -> list[list[float]]:
    found = []
    for name, kind, stage in cases:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        engine = engine_of(
            tiny(name),
            zero_optimization=zero,
            sequence_parallel_size=2,
            optimizer={"type": "AdamW", "params": ADAMW},
        )
        found.append(train(engine, kind, steps=CURVE))
        engine.destroy()
    return found


@pytest.mark.parametrize(
    "cases",
    [[("qwen", "plain", 2), ("bert", "masked", 3)], pytest.param(CURVES, marks=pytest.mark.long)],
    ids=["two", "all"],
)
def test_curves_of_twenty_steps_are_those_of_one_process(cases: list[tuple[str, str, int]]) -> None:
    expected = []
    for name, kind, _ in cases:
        model = tiny(name)
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        expected.append(plain(model, kind, steps=CURVE, optimizer=optimizer))
    for found in run_distributed(curves, 2, cases):
        for case, losses, others in zip(cases, found, expected, strict=True):
            assert losses == pytest.approx(others, rel=1e-5), case
