"""One rank of one system of ``trainer_step.py``: a Trainer that waits after each of its steps."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Random tokens, the same for every system."""

    def __init__(self, shape: dict[str, Any]) -> None:
        self._shape = shape

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(index)
        tokens = torch.randint(
            self._shape["vocabulary"], (self._shape["sequence"],), generator=draw
        )
        return {"input_ids": tokens, "labels": tokens}


class Turns(TrainerCallback):
    """Says that a step has ended, and waits to be told to take the next."""

    def __init__(self, answers: Any) -> None:
        self._answers = answers

    def answer(self, **facts: object) -> None:
        self._answers.write(json.dumps(facts) + "\n")
        self._answers.flush()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == 1:  # whatever is made in the first step is not counted
            self.answer(torch=torch.__version__)
        else:
            self.answer()
        if sys.stdin.readline().strip() == "end":
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            self.answer(last_loss=losses[-1])
            self._answers.close()
            shutil.rmtree(args.output_dir)
            os._exit(0)  # groups of several systems end in any order; nothing is left to save


def config(stage: str) -> dict[str, Any] | None:
    """A config of DeepSpeed for a stage, as guides for the Trainer have it."""
    if not stage:
        return None
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": int(stage),
            "overlap_comm": True,
            "contiguous_gradients": True,
        },
        "zero_allow_untested_optimizer": True,
        # torch's update everywhere, so that nothing has to be compiled
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True},
        },
    }


def main() -> None:
    system, _, stage = sys.argv[1].partition(":")
    if system == "alone":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    shape = json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not be taken for an answer
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        deepspeed=config(stage),
        per_device_train_batch_size=shape["micro_batch"],
        gradient_accumulation_steps=shape["accumulation"],
        max_steps=1_000_000,
        logging_steps=1,
        save_strategy="no",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape["vocabulary"],
            n_positions=shape["sequence"],
            n_embd=shape["width"],
            n_layer=shape["layers"],
            n_head=shape["heads"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    trainer = Trainer(
        model=model, args=settings, train_dataset=Texts(shape), callbacks=[Turns(answers)]
    )
    trainer.train()


if __name__ == "__main__":
    main()
