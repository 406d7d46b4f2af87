"""TRL's trainers: supervised, preferences, and rewards on what the model writes itself."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from drivetrain.testing import run_distributed

NEEDS = ("transformers", "accelerate", "trl")

WORDS = [f"w{number}" for number in range(60)]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<end>", "<pad>", "<unknown>", *WORDS]
    fast = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(known)}, "<unknown>")
    )
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="<end>", pad_token="<pad>", unk_token="<unknown>"
    )


def save_base(folder):
    """A model with a tokenizer in a folder, as trainers read it."""
    tiny.start_anew()
    tiny.language_model(pad_token_id=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def sentences(number, length, seed):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, length)) for _ in range(number)]


def settings(kind, folder, config, **changes):
    usual = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 0.05,
        "optim": "sgd",
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return kind(output_dir=f"{folder}/run", deepspeed=config, **{**usual, **changes})


def supervised(folder, config):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tiny.start_anew()
    trainer = SFTTrainer(
        model=f"{folder}/base",
        args=settings(SFTConfig, folder, config, max_length=16),
        train_dataset=Dataset.from_dict({"text": sentences(24, 6, 1)}),
        processing_class=tokenizer(),
    )
    trainer.train()
    return tiny.told(trainer)


def preferences(folder, config):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tiny.start_anew()
    texts = {
        name: sentences(24, 4, seed) for seed, name in enumerate(("prompt", "chosen", "rejected"))
    }
    trainer = DPOTrainer(
        model=f"{folder}/base",
        args=settings(DPOConfig, folder, config, max_length=16, beta=5.0),
        train_dataset=Dataset.from_dict(texts),
        processing_class=tokenizer(),
    )
    trainer.train()
    return tiny.told(trainer)


def reward(completions, **_):
    return [float(len(set(text.split()))) + (text.count("w1") > 0) for text in completions]


def rewards(folder, config):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tiny.start_anew()
    trainer = GRPOTrainer(
        model=f"{folder}/base",
        args=settings(
            GRPOConfig, folder, config, num_generations=2, max_completion_length=6, beta=0.1
        ),
        train_dataset=Dataset.from_dict({"prompt": sentences(12, 4, 1)}),
        processing_class=tokenizer(),
        reward_funcs=reward,
    )
    trainer.train()
    return tiny.told(trainer)


def stage(number):
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": number,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


def assert_trains_as_ddp(run, number, folder):
    run_distributed(save_base, 1, f"{folder}/base")
    reference, found = (
        run_distributed(run, 2, str(folder), config)[0] for config in (None, stage(number))
    )
    assert len(reference["losses"]) == 3
    assert found["losses"] == pytest.approx(reference["losses"], rel=1e-3, abs=1e-5)
    for name, weight in reference["weights"].items():
        np.testing.assert_allclose(found["weights"][name], weight, rtol=1e-4, atol=2e-6)


def test_supervised_at_stage_3(tmp_path):
    assert_trains_as_ddp(supervised, 3, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("run", [supervised, preferences, rewards])
def test_all_trainers(run, number, tmp_path):
    assert_trains_as_ddp(run, number, tmp_path)
