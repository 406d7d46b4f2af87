"""What scheduling costs, and whether blocks get lost: the engine around a model that does nothing.

    python benchmarks/schedule.py                     # 256 sequences; 10,000 random requests

Times are those of this thread's processor, so that other programs count little. ``--step`` is how
long a forward of the real model takes for so many sequences, of which the share is stated.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

import torch
from drivetrain_inference import SamplingParams, serve
from transformers import LlamaConfig, LlamaForCausalLM

TINY = {
    "vocab_size": 512, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


class Nothing:
    """Stands in for the model: logits are there already."""

    def __init__(self, model: Any) -> None:
        self.layers, self.dtype, self.device = model.layers, model.dtype, model.device
        self._logits = torch.randn(4096, TINY["vocab_size"])

    def __call__(self, cache: object, batch: Any) -> torch.Tensor:
        return self._logits[: len(batch.last)]

    def close(self) -> None:
        pass


def engine_of(**section: Any) -> Any:
    """An engine around :class:`Nothing`."""
    found = serve(LlamaForCausalLM(LlamaConfig(**TINY)).eval(), {"inference": section})
    found.ragged.model = Nothing(found.ragged.model)
    return found


def per_step(sequences: int, tokens: int) -> dict[str, float]:
    """Milliseconds of a step in which all sequences decode."""
    section = {"max_sequences": sequences, "max_batch_tokens": 4 * sequences}
    with engine_of(**section) as engine:
        params = SamplingParams(max_new_tokens=tokens + 400, ignore_eos=True)
        for number in range(sequences):
            engine.add([number % 500] * 100, params)
        while any(each.pending != 1 for each in engine.scheduler):
            engine.step()
        choosing = 0.0
        began = time.thread_time()
        for _ in range(tokens):
            engine.step()
        whole = (time.thread_time() - began) / tokens
        began = time.thread_time()
        for _ in range(tokens):  # no step between: what is chosen again is not computed
            for sequence in engine.scheduler.running:
                sequence.table.length = len(sequence.prompt) + len(sequence.output) - 1
            engine.scheduler.next()
        choosing = (time.thread_time() - began) / tokens
    return {"step_ms": round(1e3 * whole, 3), "scheduler_ms": round(1e3 * choosing, 3)}


def arrivals(number: int) -> dict[str, Any]:
    """Random requests that come, are cancelled and give way; blocks that are lost at the end."""
    draw = random.Random(1)  # noqa: S311 - the same requests every time
    section = {"block_size": 4, "cache_blocks": 48, "max_sequences": 12, "max_batch_tokens": 48}
    with engine_of(**section, speculative_tokens=2) as engine:
        alive: list[int] = []
        for _ in range(number):
            params = SamplingParams(
                max_new_tokens=draw.randrange(1, 24), n=draw.choice((1, 1, 1, 3)),
                temperature=draw.choice((0.0, 1.0)),
            )  # fmt: skip
            if draw.random() < 0.1:
                params = SamplingParams(max_new_tokens=draw.randrange(1, 12), num_beams=3)
            prompt = [draw.randrange(512 if draw.random() < 0.6 else 2)] * draw.choice((3, 9, 30))
            alive.append(engine.add(prompt, params, timeout=draw.choice((None, None, 0.0))))
            if draw.random() < 0.2:
                engine.cancel(draw.choice(alive))
            del alive[:-64]
            for _ in range(draw.randrange(1, 5)):
                engine.step()
            while len(engine.scheduler.waiting) > 1000:
                engine.step()
        while engine.busy:
            engine.step()
        engine.scheduler.blocks.check([])
        lost = engine.scheduler.blocks.blocks - engine.scheduler.blocks.free
        return {"requests": number, "preemptions": engine.scheduler.preemptions, "lost": lost}


def planned() -> float:
    """Bytes of the cache as they are, as a share of those that the config allows."""
    with engine_of(cache_bytes=2**24, max_sequences=512, max_batch_tokens=512) as engine:
        tensors = (*engine.cache.keys, *engine.cache.values)
        return sum(each.numel() * each.element_size() for each in tensors) / 2**24


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--step", type=float, help="milliseconds of a real forward")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cost = per_step(options.sequences, options.tokens)
    if options.step:
        cost["share"] = round(cost["step_ms"] / options.step, 4)
    report = {"cost": cost, "cache_share": round(planned(), 4), **arrivals(options.requests)}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
