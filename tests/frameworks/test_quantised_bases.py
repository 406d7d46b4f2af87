"""Adapters of PEFT over a base of bitsandbytes' 4-bit weights train as on DDP (QLoRA)."""

from __future__ import annotations

import pytest
import tiny
from test_trainer_of_transformers import assert_same, stage

from drivetrain.testing import run_distributed

NEEDS = ("transformers", "accelerate", "peft", "bitsandbytes")

pytestmark = pytest.mark.long


def save_base(folder):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny.start_anew()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=tiny.VOCABULARY, num_hidden_layers=2, **sizes)
    ).save_pretrained(folder)


def train(folder, config):
    """One run; weights of the adapters alone are told."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer

    tiny.start_anew()
    settings = tiny.arguments(folder, deepspeed=config, learning_rate=0.5)
    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = LlamaForCausalLM.from_pretrained(f"{folder}/base", quantization_config=packed)
    torch.manual_seed(2)
    adapters = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    trainer = Trainer(
        model=get_peft_model(base, adapters), args=settings, train_dataset=tiny.texts()
    )
    trainer.train()
    told = tiny.told(trainer)
    told["weights"] = {n: w for n, w in told["weights"].items() if "lora_" in n}
    return told


@pytest.mark.parametrize("number", [2, 3])
def test_over_4_bit_weights(number, tmp_path):
    run_distributed(save_base, 1, str(tmp_path / "base"))
    reference = run_distributed(train, 2, str(tmp_path), None)[0]
    found = run_distributed(train, 2, str(tmp_path), stage(number))[0]
    assert len(reference["weights"]) == 8
    assert_same(found, reference)
