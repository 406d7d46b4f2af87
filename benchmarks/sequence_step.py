"""Time of a step with sequences that two ranks share, and with tiles, beside one rank without.

One thread for each rank. Ways take turns, and the fewest seconds of each count, since other work on
a machine only adds to them: by the clock, and of the processor, which other work changes less. Of
ranks the slowest counts. Prints JSON: seconds by way, the time of tiles over that without, and that
of two ranks over half of one rank's (1.0 is twice as fast).
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "loss_tile": {"loss_tile": 512},
    "mlp_tile": {"mlp_tile": 512},
    "both": {"loss_tile": 512, "mlp_tile": 512},
}
"""Sections ``sequence_parallel`` of one rank."""

Seconds = dict[str, float]


def model_of(length: int) -> Any:
    """A Llama of 4 layers, width 256, with one matrix for embedding and head."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=50257,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def engine_of(length: int, ranks: int, section: dict[str, Any]) -> Engine:
    """An engine with SGD."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "sequence_parallel_size": ranks,
        "sequence_parallel": section,
    }
    engine, *_ = drivetrain.initialize(model=model_of(length), config=config)
    return engine


def step(engine: Engine, length: int) -> tuple[float, float]:
    """Seconds of one step: by the clock, and of this thread's and autograd's processor time."""
    tokens = torch.randint(50257, (1, length), generator=torch.Generator().manual_seed(0))
    begin, used = time.perf_counter(), time.process_time()
    engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
    engine.step()
    return time.perf_counter() - begin, time.process_time() - used


def timed(length: int, ranks: int, ways: dict[str, dict[str, Any]], rounds: int) -> list[Any]:
    """Seconds of every step of each way in turn, after one that counts for nothing."""
    torch.set_num_threads(1)
    engines = {way: engine_of(length, ranks, section) for way, section in ways.items()}
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, engine in engines.items():
            seconds = step(engine, length)
            if turn:
                found[way].append(seconds)
    for engine in engines.values():
        engine.destroy()
    return list(found.items())


def fewest(ranks: list[list[Any]]) -> dict[str, Seconds]:
    """By way, of the slowest rank in the quickest step."""
    found = {}
    for each in zip(*ranks, strict=True):
        steps = zip(*(seconds for _, seconds in each), strict=True)
        slowest = [tuple(max(parts) for parts in zip(*step, strict=True)) for step in steps]
        clock, processor = (min(parts) for parts in zip(*slowest, strict=True))
        found[each[0][0]] = {"clock": round(clock, 3), "processor": round(processor, 3)}
    return found


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each way")
    options = parser.parse_args()
    alone = fewest(run_distributed(timed, 1, options.length, 1, WAYS, options.rounds))
    both = fewest(run_distributed(timed, 2, options.length, 2, {"two": {}}, options.rounds))["two"]
    plain = alone["plain"]
    tiles = {
        way: {kind: round(seconds[kind] / plain[kind], 3) for kind in plain}
        for way, seconds in alone.items()
        if way != "plain"
    }
    two = {kind: round(both[kind] / (plain[kind] / 2), 3) for kind in plain}
    print(
        json.dumps(
            {"seconds": {**alone, "two ranks": both}, "tiles": tiles, "two_over_half": two},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
