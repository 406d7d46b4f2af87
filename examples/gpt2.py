"""A GPT-2 of Transformers, trained from a config alone: on one process, or over several.

    drivetrain run --nproc 4 examples/gpt2.py --config examples/gpt2_pipeline.json
    drivetrain run --nproc 4 examples/gpt2.py --config examples/gpt2_tensor.json
    drivetrain run --nproc 4 examples/gpt2.py --config examples/gpt2_pipeline_tensor.json
    drivetrain run --nproc 1 examples/gpt2.py --set pipeline.stages=1

The first splits the model over two stages and the data over two shards, with ZeRO's stage 2; the
second shares out each layer over two ranks, with ZeRO's stage 3 over two data shards; the third
shares out the layers of two stages. The losses are those of one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

import drivetrain

VOCABULARY, LENGTH, ROWS = 64, 16, 2


def network() -> transformers.GPT2LMHeadModel:
    """Four layers of width 32, without dropout."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=32,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.GPT2LMHeadModel(config)


def batches(engine: drivetrain.Engine) -> Iterator[dict[str, torch.Tensor]]:
    """Sequences that count upwards, the same global batch on any number of ranks."""
    mesh = engine.job.mesh
    shard, shards = mesh.coordinate("dp"), mesh.size("dp")
    generator = torch.Generator().manual_seed(1)
    while True:
        first = torch.randint(0, VOCABULARY, (8 // shards * shards, ROWS, 1), generator=generator)
        for start in first[shard::shards]:
            tokens = (start + torch.arange(LENGTH)) % VOCABULARY
            yield {"input_ids": tokens, "labels": tokens}


def main() -> None:
    """Train for some steps and show the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--config", default=str(Path(__file__).with_name("gpt2_pipeline.json")))
    parser.add_argument("--set", dest="overlays", action="append", default=[])
    args = parser.parse_args()
    torch.manual_seed(0)
    engine, *_ = drivetrain.initialize(model=network(), config=args.config, overlays=args.overlays)
    data = batches(engine)
    for _ in range(args.steps):
        loss = engine.train_batch(data).item()
        if engine.job.rank == 0:
            print(f"step {engine.global_steps}: loss {loss:.6f}", flush=True)
    engine.destroy()


if __name__ == "__main__":
    main()
