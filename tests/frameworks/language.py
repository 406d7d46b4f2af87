"""A script as Transformers' examples are: a text file, a tokenizer, the Trainer, its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class Arguments:
    """What this script takes beside the Trainer's arguments."""

    train_file: str
    model_name_or_path: str
    block_size: int = 8


def main():
    """Train a language model on the lines of a file, cut into blocks of equal length."""
    parser = HfArgumentParser((Arguments, TrainingArguments))
    own, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(own.model_name_or_path)
    lines = Path(own.train_file).read_text("utf-8").splitlines()
    tokens = list(chain.from_iterable(tokenizer(lines)["input_ids"]))
    starts = range(0, len(tokens) - own.block_size + 1, own.block_size)
    blocks = [tokens[start : start + own.block_size] for start in starts]
    model = AutoModelForCausalLM.from_pretrained(own.model_name_or_path)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
