"""Transformers' Trainer under every kind of config: pairs of settings, and a test for each use."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from test_trainer_of_transformers import ADAM, ADAMW, assert_same, on_ddp, stage

from drivetrain.testing import run_distributed

NEEDS = ("transformers", "accelerate")

pytestmark = pytest.mark.long

NUMBERS = {"reduce_bucket_size": 300, "stage3_param_persistence_threshold": 100}
WARM = {
    "type": "WarmupDecayLR",
    "params": {
        "total_num_steps": "auto",
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
    },
}

# stage, offloaded to, dtype, micro-batches, clipping, whose optimizer, values
PAIRS = [
    (0, None, "fp32", 1, 0.0, "own", "auto"),
    (0, None, "bf16", 3, 0.5, "config", "numbers"),
    (1, "cpu", "fp32", 3, 0.0, "config", "auto"),
    (1, "nvme", "bf16", 1, 0.5, "own", "numbers"),
    (1, None, "fp16", 1, 0.5, "config", "auto"),
    (2, "cpu", "bf16", 1, 0.0, "own", "auto"),
    (2, "nvme", "fp16", 3, 0.0, "config", "auto"),
    (2, None, "fp32", 3, 0.5, "config", "numbers"),
    (3, "cpu", "fp16", 3, 0.5, "own", "numbers"),
    (3, "nvme", "fp32", 1, 0.5, "config", "auto"),
    (3, "nvme", "bf16", 3, 0.0, "own", "auto"),
    (3, None, "fp32", 3, 0.0, "own", "numbers"),
    (3, "cpu", "fp32", 1, 0.5, "config", "auto"),
]


def offloaded(number, to, folder):
    """What is offloaded: optimizer states, and at stage 3 the parameters too."""
    if to is None:
        return {}
    place = {"device": to, "pin_memory": True}
    if to == "nvme":
        place["nvme_path"] = str(folder)
    away = {"offload_optimizer": place}
    return {**away, "offload_param": dict(place)} if number == 3 else away


@pytest.mark.parametrize(("number", "to", "dtype", "accumulate", "clip", "whose", "values"), PAIRS)
def test_pairs_of_settings(number, to, dtype, accumulate, clip, whose, values, tmp_path):
    changes = {"gradient_accumulation_steps": accumulate, "max_grad_norm": clip}
    config = stage(number, **offloaded(number, to, tmp_path))
    config["zero_force_ds_cpu_optimizer"] = False  # or Accelerate makes an Adam of any optimizer
    if values == "numbers":
        config |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": accumulate}
        config["zero_optimization"] |= NUMBERS
    if whose == "config":
        config["optimizer"] = ADAM
        changes |= ADAMW
    reference = on_ddp(tmp_path, **changes)
    if dtype != "fp32":
        changes[dtype] = True
    found = run_distributed(tiny.train, 2, tmp_path, config, changes)
    if dtype == "fp32":
        assert_same(found[0], reference)
    else:
        assert_close(found[0], reference)


def assert_close(found, reference):
    """Half precision follows the float32 run, a few rounding errors away."""
    assert found["losses"] == pytest.approx(reference["losses"], rel=0.02)
    before = tiny.language_model().state_dict()
    names = list(reference["weights"])
    start, end, there = (
        np.concatenate([np.ravel(weights[name]) for name in names])
        for weights in (before, reference["weights"], found["weights"])
    )
    assert np.linalg.norm(there - end) < 0.2 * np.linalg.norm(end - start)


def test_a_schedule_of_the_config(tmp_path):
    config = {**stage(2), "optimizer": ADAM, "scheduler": WARM}
    changes = {**ADAMW, "warmup_steps": 2, "max_steps": 6}
    found = run_distributed(tiny.train, 2, tmp_path, config, changes)[0]
    assert found["losses"][-1] < found["losses"][0]
    assert max(found["rates"]) == pytest.approx(0.01)
    assert found["rates"][-1] < 0.01


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(number, reentrant, tmp_path):
    changes = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    found = run_distributed(tiny.train, 2, tmp_path, stage(number), changes)[0]
    assert_same(found, on_ddp(tmp_path))


@pytest.mark.parametrize("number", [2, 3])
def test_torch_compile(number, tmp_path):
    changes = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    found = run_distributed(tiny.train, 2, tmp_path, stage(number), changes)[0]
    assert_same(found, on_ddp(tmp_path))


def from_pretrained(folder, config):
    """Train what ``from_pretrained`` reads, and generate from it."""
    import torch
    from transformers import GPT2LMHeadModel, Trainer

    tiny.start_anew()
    settings = tiny.arguments(folder, deepspeed=config)
    model = GPT2LMHeadModel.from_pretrained(f"{folder}/base")
    sharded = sum(hasattr(p, "ds_id") for p in model.parameters())
    trainer = Trainer(model=model, args=settings, train_dataset=tiny.texts())
    trainer.train()
    told = tiny.told(trainer)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]]) + trainer.args.process_index
    with torch.no_grad():
        written = trainer.model.generate(prompts, max_new_tokens=6, do_sample=False)
    return {**told, "sharded": sharded, "written": written.tolist()}


def evaluate(folder, config):
    """Losses of a model that is never trained."""
    from transformers import GPT2LMHeadModel, Trainer

    tiny.start_anew()
    settings = tiny.arguments(folder, deepspeed=config)
    model = GPT2LMHeadModel.from_pretrained(f"{folder}/base")
    return Trainer(model=model, args=settings).evaluate(tiny.texts(8))["eval_loss"]


def test_a_model_that_is_read_into_shards_is_evaluated_alone(tmp_path):
    run_distributed(save_base, 1, str(tmp_path / "base"))
    reference = run_distributed(evaluate, 2, str(tmp_path), None)
    found = run_distributed(evaluate, 2, str(tmp_path), stage(3))
    assert found == pytest.approx(reference, rel=1e-5)


def save_base(folder):
    tiny.start_anew()
    tiny.language_model().save_pretrained(folder)


def test_a_model_that_is_read_into_shards_trains_and_generates(tmp_path):
    run_distributed(save_base, 1, str(tmp_path / "base"))
    references = run_distributed(from_pretrained, 2, str(tmp_path), None)
    config = stage(3, stage3_param_persistence_threshold=0)
    found = run_distributed(from_pretrained, 2, str(tmp_path), config)
    assert references[0]["sharded"] == 0
    assert found[0]["sharded"] > 20
    assert_same(found[0], references[0])
    for ours, reference in zip(found, references, strict=True):
        assert ours["written"] == reference["written"]


def sequences(folder, config):
    """A T5 that is evaluated by what it generates, of different lengths on the ranks."""
    import torch
    from transformers import (
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        T5Config,
        T5ForConditionalGeneration,
    )

    tiny.start_anew()
    torch.manual_seed(0)
    settings = Seq2SeqTrainingArguments(
        output_dir=folder,
        deepspeed=config,
        predict_with_generate=True,
        generation_max_length=10,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=1,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        optim="sgd",
        learning_rate=0.05,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=16,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    draw = torch.Generator().manual_seed(3)
    data = [
        {
            "input_ids": torch.randint(2, 16, (6,), generator=draw),
            "labels": torch.randint(2, 16, (4,), generator=draw),
        }
        for _ in range(16)
    ]
    trainer = Seq2SeqTrainer(model=model, args=settings, train_dataset=data, eval_dataset=data[:6])
    trainer.train()
    answer = trainer.predict(data[:6])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, answer.predictions.tolist(), answer.metrics["test_loss"]


def test_sequences_are_generated_in_an_evaluation_at_stage_3(tmp_path):
    reference = run_distributed(sequences, 2, str(tmp_path), None)[0]
    config = stage(3, stage3_param_persistence_threshold=0)
    losses, written, loss = run_distributed(sequences, 2, str(tmp_path), config)[0]
    assert losses == pytest.approx(reference[0], rel=1e-3)
    assert written == reference[1]
    assert loss == pytest.approx(reference[2], rel=1e-4)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_run_goes_on_at_another_number_of_ranks(number, tmp_path):
    reference = on_ddp(tmp_path)
    saving = {"save_strategy": "steps", "save_steps": 2}
    alone = {**saving, "per_device_train_batch_size": 4}
    run_distributed(tiny.train, 1, tmp_path / "run", stage(number), alone)
    resumed = {"resume": "checkpoint-2"}
    found = run_distributed(tiny.train, 2, tmp_path / "run", stage(number), resumed)
    assert_same(found[0], reference)
