"""Transformers' Trainer trains at ZeRO's stages as it does on torch's data parallelism."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from drivetrain.testing import run_distributed

NEEDS = ("transformers", "accelerate")

AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}
ADAM = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
}

# As large an epsilon as this keeps AdamW from making steps of gradients that are rounding errors.
ADAMW = {"optim": "adamw_torch", "learning_rate": 0.01, "adam_epsilon": 1e-3}


def stage(number, **zero):
    buckets = {
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    return {**AUTO, "zero_optimization": {"stage": number, **buckets, **zero}}


def assert_same(found, reference):
    """Equal within rounding; weights also where a log could not tell."""
    for name in ("losses", "norms", "evaluations"):
        assert found[name] == pytest.approx(reference[name], rel=2e-5), name
    assert found["weights"].keys() == reference["weights"].keys()
    for name, weight in reference["weights"].items():
        np.testing.assert_allclose(found["weights"][name], weight, rtol=1e-4, atol=2e-6)


def on_ddp(folder, **changes):
    return run_distributed(tiny.train, 2, folder, None, changes)[0]


def test_at_stage_2_with_the_optimizer_of_the_config(tmp_path):
    changes = ADAMW
    reference = on_ddp(tmp_path, **changes)
    config = {**stage(2), "optimizer": ADAM}
    found = run_distributed(tiny.train, 2, tmp_path, config, changes)
    assert_same(found[0], reference)
    assert len(reference["losses"]) == 4


def test_at_stage_3_with_its_own_optimizer_and_on_one_rank_after_a_resume(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 2}
    reference = on_ddp(tmp_path / "ddp", **changes)
    config = stage(3, stage3_param_persistence_threshold=0)
    saving = {**changes, "save_strategy": "steps", "save_steps": 2, "save_model": tmp_path / "own"}
    found = run_distributed(tiny.train, 2, tmp_path / "run", config, saving)
    assert_same(found[0], reference)
    assert_same({**reference, "weights": saved(tmp_path / "own")}, reference)
    alone = {**changes, "per_device_train_batch_size": 4, "resume": "checkpoint-2"}
    resumed = run_distributed(tiny.train, 1, tmp_path / "run", config, alone)
    assert_same(resumed[0], reference)


def twice(folder, config):
    """Train by two Trainers in one process, each with a model of its own.

    One Trainer cannot train twice: it lets Accelerate free the engine, and asks it again.
    """
    return [tiny.train(folder, config, {}) for _ in range(2)]


def test_training_twice_in_one_process_at_stage_3(tmp_path):
    config = stage(3, stage3_param_persistence_threshold=0)
    reference = on_ddp(tmp_path)
    for found in run_distributed(twice, 2, tmp_path, config)[0]:
        assert_same(found, reference)


def saved(folder):
    """Weights in a folder that the Trainer wrote, as Transformers reads them."""
    return run_distributed(weights_in, 1, folder)[0]


def weights_in(folder):
    from transformers import GPT2LMHeadModel

    tiny.start_anew()
    model = GPT2LMHeadModel.from_pretrained(folder)
    return {name: value.numpy() for name, value in model.state_dict().items()}
