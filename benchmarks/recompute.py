"""Measure what recomputed blocks save and cost on one rank of one CPU thread, as JSON.

    python benchmarks/recompute.py

A GPT of eight blocks and 6.5 million parameters, 1,024 tokens a step. ``kept`` is what autograd
keeps between forward and backward, as a part of what it keeps without recomputation: storages of
saved tensors, each once, parameters left out. ``time`` is a step's, as the median ratio of pairs
of steps that take turns. ``as_needed`` may keep half of what blocks keep without recomputation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.testing.models import TinyGPT

TOKENS = (4, 256)
WARM = 3


def main() -> None:
    """Print the figures of each setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=15)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    plain = start()
    for _ in range(WARM):
        step(plain)
    kept = kept_bytes(plain)
    settings = {
        "all": {"recompute": "all"},
        "every second": {"recompute": 2},
        "as needed": {"recompute": "as_needed", "memory_limit": kept // 2},
    }
    found = {}
    for name, section in settings.items():
        engine = start(activation_checkpointing=section)
        for _ in range(WARM):
            step(engine)
        ratios = [step(engine) / step(plain) for _ in range(pairs)]
        found[name] = {
            "kept": round(kept_bytes(engine) / kept, 3),
            "time": round(statistics.median(ratios), 3),
        }
        engine.job.close()
    plain.job.close()
    print(json.dumps({"kept_bytes_without": kept, "settings": found}, indent=2))


def start(**sections: Any) -> Engine:
    """An engine of the model."""
    torch.manual_seed(0)
    model = TinyGPT(vocabulary=512, width=256, layers=8, positions=TOKENS[1])
    engine, *_ = drivetrain.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": TOKENS[0],
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            **sections,
        },
    )
    return engine


def loss_of(engine: Engine) -> torch.Tensor:
    """The loss of one batch."""
    tokens = torch.randint(512, TOKENS)
    loss: torch.Tensor = engine(tokens, tokens.roll(-1, 1))
    return loss


def step(engine: Engine) -> float:
    """Seconds of one step."""
    begin = time.perf_counter()
    engine.backward(loss_of(engine))
    engine.step()
    return time.perf_counter() - begin


def kept_bytes(engine: Engine) -> int:
    """Bytes that autograd keeps from a forward on."""
    sizes: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # so that no storage takes another's place

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            alive.append(tensor.detach())
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.backward(loss_of(engine))
    engine.zero_grad()
    return sum(sizes.values())


if __name__ == "__main__":
    main()
