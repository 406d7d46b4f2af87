"""Train with attention to some blocks of keys only: the quickstart's GPT, or a Llama.

    drivetrain run examples/sparse_attention.py
    drivetrain run examples/sparse_attention.py --model llama --mode topk
    drivetrain run examples/sparse_attention.py --mode dense --context 1024

Prints the losses, and how long the steps took.
"""

from __future__ import annotations

import argparse
import time

import torch
from long_sequence import make
from text_data import standard_library

import drivetrain

LAYOUTS = {
    "dense": {},
    "fixed": {"num_local_blocks": 4},
    "bigbird": {"num_sliding_window_blocks": 3, "num_random_blocks": 1},
    "bslongformer": {"num_sliding_window_blocks": 3},
    "local": {"num_sliding_window_blocks": 5},
    "topk": {"top_k": 4},
}


def main() -> None:
    """Train, and print losses and times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("gpt", "llama"), default="gpt")
    parser.add_argument("--mode", choices=LAYOUTS, default="bigbird")
    parser.add_argument("--block", type=int, default=16, help="bytes of a block")
    parser.add_argument("--context", type=int, default=512, help="bytes of a sequence")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    layout = {"mode": options.mode, "block": options.block, **LAYOUTS[options.mode]}
    engine, *_ = drivetrain.initialize(
        model=make(options.model, options.context),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
            "sparse_attention": layout,
        },
    )
    text = torch.frombuffer(bytearray(standard_library()), dtype=torch.uint8).long()
    data = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(text) - options.context - 1, (2,), generator=data)
        windows = torch.stack([text[start : start + options.context + 1] for start in starts])
        batch = (windows[:, :-1], windows[:, 1:])
        if options.model == "llama":
            batch = {"input_ids": windows[:, :-1], "labels": windows[:, :-1]}
        loss = engine.train_batch(iter([batch]))
        if engine.job.rank == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    if engine.job.rank == 0:
        print(f"{(time.perf_counter() - began) / options.steps:.3f} s a step")
    engine.destroy()


if __name__ == "__main__":
    main()
