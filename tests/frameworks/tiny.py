"""A tiny language model with data, and runs of Transformers' Trainer on it, for ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

SEQUENCE = 8
VOCABULARY = 64


def start_anew():
    """Drop what frameworks keep per process, since ranks are used again."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    deepspeed = sys.modules.get("transformers.integrations.deepspeed")
    if deepspeed is not None:
        deepspeed.unset_hf_deepspeed_config()


def language_model(**changes):
    """A GPT-2 of 10,000 parameters, tied, without dropout; the same on every rank."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(config(**changes))


def config(**changes):
    from transformers import GPT2Config

    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2Config(**{**sizes, **none, **ends, **changes})


def texts(number=64):
    """Samples of random tokens, some of them without a label."""
    draw = torch.Generator().manual_seed(1)
    samples = []
    for _ in range(number):
        tokens = torch.randint(1, VOCABULARY, (SEQUENCE,), generator=draw)
        labels = tokens.clone()
        labels[: int(torch.randint(0, 4, (), generator=draw))] = -100
        samples.append({"input_ids": tokens, "labels": labels})
    return samples


def arguments(folder, **changes):
    """Arguments of the Trainer; those given win."""
    from transformers import TrainingArguments

    usual = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 0.05,
        "max_grad_norm": 0.5,
        "optim": "sgd",
        "seed": 0,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**usual, **changes})


def told(trainer):
    """What a run has logged, and its weights, whole."""
    history = trainer.state.log_history
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "norms": [float(entry["grad_norm"]) for entry in history if "grad_norm" in entry],
        "rates": [entry["learning_rate"] for entry in history if "learning_rate" in entry],
        "evaluations": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        "weights": {} if state is None else {k: v.float().numpy() for k, v in state.items()},
    }


def train(folder, deepspeed, changes):
    """One run of the Trainer; called on every rank.

    Args:
        folder: of the run's checkpoints.
        deepspeed: config; plain DDP with ``None``.
        changes: of the Trainer's arguments, and ``resume``, a checkpoint to go on from;
            ``save_model``, a folder for the trained model; ``lora``, to train adapters alone.
    """
    from transformers import Trainer

    start_anew()
    ours = {name: changes.pop(name, None) for name in ("resume", "save_model", "lora")}
    settings = arguments(folder, deepspeed=deepspeed, **changes)
    data = texts()
    model = language_model()
    trainer = Trainer(
        model=adapted(model) if ours["lora"] else model,
        args=settings,
        train_dataset=data,
        eval_dataset=[{**sample, "labels": sample["input_ids"]} for sample in data[:8]],
    )
    trainer.train(
        resume_from_checkpoint=str(Path(folder, ours["resume"])) if ours["resume"] else None
    )
    if ours["save_model"] is not None:
        trainer.save_model(str(ours["save_model"]))
    return told(trainer)


def adapted(model):
    """The model with LoRA adapters (Hu et al. 2021, arXiv 2106.09685) on its attention."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    adapters = LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, adapters)
