"""Tensor parallelism: bytes and time of a step on two ranks, beside one process.

``bytes_to_formula`` is what ranks reduced in the layers of one step, divided by what the paper says
(Shoeybi et al. 2019, section 3): four all-reduces of batch x tokens x width numbers in each layer.
``time_to_bound`` is the time of a step on two ranks with one thread each, divided by half of that
of one process with one thread plus that of the same all-reduces alone.

    python benchmarks/tensor_step.py --pairs 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

import drivetrain
from drivetrain.contracts import Purpose, Tag
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

LAYERS, WIDTH, HEADS, TOKENS, ROWS, VOCABULARY = 4, 256, 8, 128, 4, 512
STEPS = 5


def make(ranks: int) -> Engine:
    """An engine of a decoder of Llama's kind."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        use_cache=False,
    )
    engine, *_ = drivetrain.initialize(
        model=LlamaForCausalLM(config),
        config={
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_clipping": 0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
            "tensor_parallel": {"autotp_size": ranks, "vocabulary": False},
        },
    )
    return engine


def step(engine: Engine, number: int) -> None:
    """One update."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()


def measure(ranks: int) -> dict[str, float]:
    """Seconds of a step and of its all-reduces alone, and bytes; runs on every rank."""
    engine = make(ranks)
    step(engine, 0)
    engine.job.byte_log.reset()
    seconds = []
    for number in range(STEPS):
        begin = time.perf_counter()
        step(engine, number)
        seconds.append(time.perf_counter() - begin)
    total = engine.job.byte_log.total(Purpose.ACTIVATION, "tp")
    alone = _alone(engine, total.calls // STEPS) if ranks > 1 else 0.0
    engine.destroy()
    return {
        "seconds": statistics.median(seconds),
        "bytes": total.payload_bytes / STEPS,
        "alone": alone,
    }


def _alone(engine: Engine, calls: int) -> float:
    """Seconds that as many all-reduces of a layer's output take by themselves."""
    x = torch.zeros(ROWS, TOKENS, WIDTH)
    tag = Tag(Purpose.CONTROL, site="benchmark")
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        for _ in range(calls):
            engine.job.communicator.all_reduce(x, "tp", tag)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    """Measure pairs in turn, and print medians of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    pairs = parser.parse_args().pairs
    formula = 4 * LAYERS * ROWS * TOKENS * WIDTH * 4
    found: list[dict[str, Any]] = []
    for _ in range(pairs):
        (one,), (two, _) = run_distributed(measure, 1, 1), run_distributed(measure, 2, 2)
        bound = one["seconds"] / 2 + two["alone"]
        found.append(
            {
                "one": one["seconds"],
                "two": two["seconds"],
                "alone": two["alone"],
                "ratio": two["seconds"] / bound,
                "bytes": two["bytes"],
            }
        )
    result = {
        "bytes_to_formula": round(found[0]["bytes"] / formula, 4),
        "time_to_bound": round(statistics.median(pair["ratio"] for pair in found), 3),
        "pairs": found,
    }
    print(json.dumps({"step": result}, indent=1))


if __name__ == "__main__":
    main()
