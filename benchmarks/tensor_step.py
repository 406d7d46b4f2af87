"""Tensor parallelism: bytes and time of a step on two ranks, beside one process.

``bytes_to_formula`` is what ranks reduced in the layers of one step, divided by what the paper says
(Shoeybi et al. 2019, section 3): four all-reduces of batch x tokens x width numbers in each layer.
``time_to_bound`` is the time of a step on two ranks with one thread each, divided by half of that
of one process with one thread plus that of the same all-reduces alone; ``processor_to_bound`` the
same in seconds of the processor, which other programs disturb less.

``--peer`` measures steps on two ranks against those of the same model that Transformers itself cuts
(``tp_plan="auto"``), in the same processes and in turn: ``time_ratio_to_tp_plan`` is the median of
ours divided by theirs.

    python benchmarks/tensor_step.py --pairs 3
    python benchmarks/tensor_step.py --peer --pairs 20
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch

import drivetrain
from drivetrain.contracts import Purpose, Tag
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

LAYERS, WIDTH, HEADS, TOKENS, ROWS, VOCABULARY = 4, 256, 8, 128, 4, 512
STEPS = 5


def config_of(width: int) -> Any:
    """A decoder of Llama's kind."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        use_cache=False,
    )


def make(ranks: int, section: dict[str, Any], width: int) -> Engine:
    """An engine that trains it."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    engine, *_ = drivetrain.initialize(
        model=LlamaForCausalLM(config_of(width)),
        config={
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_clipping": 0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
            "tensor_parallel": {"autotp_size": ranks, **section},
        },
    )
    return engine


def tokens_of(number: int) -> torch.Tensor:
    """A batch."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)


def step(engine: Engine, number: int) -> None:
    """One update."""
    tokens = tokens_of(number)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()


def measure(ranks: int, section: dict[str, Any], width: int) -> dict[str, float]:
    """Seconds of a step and of its all-reduces alone, and bytes; runs on every rank."""
    engine = make(ranks, section, width)
    step(engine, 0)
    engine.job.byte_log.reset()
    seconds, processor = [], []
    for number in range(STEPS):
        begin, used = time.perf_counter(), time.process_time()
        step(engine, number)
        seconds.append(time.perf_counter() - begin)
        processor.append(time.process_time() - used)
    total = engine.job.byte_log.total(Purpose.ACTIVATION, "tp")
    alone = _alone(engine, total.calls // STEPS, width) if ranks > 1 else (0.0, 0.0)
    engine.destroy()
    return {
        "seconds": statistics.median(seconds),
        "processor": statistics.median(processor),
        "bytes": total.payload_bytes / STEPS,
        "alone": alone[0],
        "processor_alone": alone[1],
    }


def _alone(engine: Engine, calls: int, width: int) -> tuple[float, float]:
    """Seconds, and those of the processor, that as many all-reduces take by themselves."""
    x = torch.zeros(ROWS, TOKENS, width)
    tag = Tag(Purpose.CONTROL, site="benchmark")
    times, processor = [], []
    for _ in range(STEPS):
        begin, used = time.perf_counter(), time.process_time()
        for _ in range(calls):
            engine.job.communicator.all_reduce(x, "tp", tag)
        times.append(time.perf_counter() - begin)
        processor.append(time.process_time() - used)
    return statistics.median(times), statistics.median(processor)


def beside_tp_plan(
    folder: str, pairs: int, section: dict[str, Any], width: int
) -> list[tuple[float, ...]]:
    """Seconds of a step, ours and that of Transformers' own layers, in turn; on every rank.

    Then seconds of the processor, which other programs disturb less.
    """
    from transformers import LlamaForCausalLM

    engine = make(2, section, width)
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = []
    for number in range(pairs + 2):
        times = [(time.perf_counter(), time.process_time())]
        step(engine, number)
        times.append((time.perf_counter(), time.process_time()))
        tokens = tokens_of(number)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append((time.perf_counter(), time.process_time()))
        found.append(tuple(b - a for clock in zip(*times, strict=True) for a, b in pairwise(clock)))
    engine.destroy()
    return found[2:]


def peer(pairs: int, section: dict[str, Any], width: int) -> dict[str, Any]:
    """Medians over rounds in which both took a step."""
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(config_of(width)).save_pretrained(folder)
        found, _ = run_distributed(beside_tp_plan, 2, folder, pairs, section, width)
    ratios = sorted(ours / theirs for ours, theirs, _, _ in found)
    processor = statistics.median(ours / theirs for _, _, ours, theirs in found)
    return {
        "time_ratio_to_tp_plan": round(statistics.median(ratios), 3),
        "processor_ratio_to_tp_plan": round(processor, 3),
        "quartiles": [round(ratios[len(ratios) * q // 4], 3) for q in (1, 3)],
        "seconds": [round(statistics.median(column), 4) for column in zip(*found, strict=True)],
    }


def bound(pairs: int, section: dict[str, Any], width: int) -> dict[str, Any]:
    """Bytes in relation to the formula, and time to half of one process and the sums alone."""
    formula = 4 * LAYERS * ROWS * TOKENS * width * 4
    found: list[dict[str, Any]] = []
    for _ in range(pairs):
        (one,) = run_distributed(measure, 1, 1, {}, width)
        two, _ = run_distributed(measure, 2, 2, section, width)
        least = one["seconds"] / 2 + two["alone"]
        found.append(
            {
                "one": one["seconds"],
                "two": two["seconds"],
                "alone": two["alone"],
                "ratio": two["seconds"] / least,
                "processor": two["processor"] / (one["processor"] / 2 + two["processor_alone"]),
                "bytes": two["bytes"],
            }
        )
    return {
        "bytes_to_formula": round(found[0]["bytes"] / formula, 4),
        "time_to_bound": round(statistics.median(pair["ratio"] for pair in found), 3),
        "processor_to_bound": round(statistics.median(pair["processor"] for pair in found), 3),
        "pairs": found,
    }


def main() -> None:
    """Measure pairs in turn, and print medians of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--vocabulary", action="store_true", help="cut the vocabulary as well")
    parser.add_argument("--sequence", action="store_true", help="share out sequences")
    parser.add_argument("--overlap", action="store_true", help="overlap sums in backward")
    parser.add_argument("--domino", action="store_true", help="compute in halves of the batch")
    parser.add_argument("--width", type=int, default=WIDTH, help="features of a token")
    options = parser.parse_args()
    section = {
        "vocabulary": options.vocabulary or options.peer,
        "sequence_parallel": options.sequence,
        "tp_overlap_comm": options.overlap,
        "domino": options.domino,
    }
    run = peer if options.peer else bound
    print(json.dumps({"step": run(options.pairs, section, options.width)}, indent=1))


if __name__ == "__main__":
    main()
