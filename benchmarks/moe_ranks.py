"""Time set-up and routing of mixtures of experts on one of many ranks that are not there.

    python benchmarks/moe_ranks.py

Set-up: `drivetrain.initialize` of blocks with 1,024 experts each, on the meta device, with torch's
fake process group. Routing: forward and backward of one layer with an expert on each rank, where
every rank is taken to send what this one does; its few numbers for each token leave the work of
choosing, ordering, counting and exchanging. Prints processor time by layers and by ranks, which
other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from drivetrain_moe import GroupedMLP, MoE
from torch import nn

import drivetrain
from drivetrain.contracts import DONE, Collective, CommunicatorWrapper, Handle, Kind

EXPERTS, WIDTH, LAYERS, RANKS = 1024, 32, 32, 1024
TOKENS, NARROW, CHOICES, ROUNDS = 4096, 32, 2, 7


class Block(nn.Module):
    """Norm, projection and experts, so that there is something dense beside them."""

    def __init__(self, ep: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        experts = GroupedMLP(EXPERTS, WIDTH, 2 * WIDTH)
        self.moe = MoE(WIDTH, experts, EXPERTS, ep, CHOICES, drop_tokens=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(self.norm(x))
        found: torch.Tensor = x + self.moe(x)[0]
        return found


class Mirror(CommunicatorWrapper):
    """Brings what this rank sends, as if all others had the same tokens."""

    def run(self, collective: Collective) -> Handle:
        if collective.kind is not Kind.ALL_TO_ALL:
            return super().run(collective)
        collective.output.copy_(collective.input)
        return DONE


def engine_of(model: nn.Module, ranks: int, stage: int) -> Any:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": stage},
    }
    return drivetrain.initialize(model=model, config=config)[0]


def close(engine: Any) -> None:
    engine.destroy()
    if dist.is_initialized():
        dist.destroy_process_group()


def set_up(layers: int, ranks: int, stage: int) -> float:
    """Processor seconds until there is an engine."""
    with torch.device("meta"):
        model = nn.Sequential(*(Block(min(ranks, EXPERTS)) for _ in range(layers)))
    begin = time.process_time()
    engine = engine_of(model, ranks, stage)
    seconds = time.process_time() - begin
    close(engine)
    return seconds


def route(ranks: int) -> float:
    """Processor milliseconds of forward and backward, the median."""
    experts = GroupedMLP(ranks, NARROW, NARROW, gated=False)
    layer = MoE(NARROW, experts, ranks, ranks, CHOICES, drop_tokens=False)
    engine = engine_of(layer, ranks, 0)
    axis = layer.way.experts
    assert axis is not None
    axis.communicator = Mirror(axis.communicator)
    x = torch.randn(TOKENS, NARROW, requires_grad=True)
    took = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        layer(x)[0].sum().backward()
        took.append(1000 * (time.process_time() - begin))
    close(engine)
    return statistics.median(took[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2, help="of ZeRO")
    options = parser.parse_args()
    set_up(1, 8, options.stage)  # imports, first use of everything
    found: dict[str, dict[str, float]] = {"set-up, seconds": {}, "routing, milliseconds": {}}
    for layers, ranks in ((LAYERS // 2, RANKS), (LAYERS, RANKS), (2 * LAYERS, RANKS)):
        seconds = set_up(layers, ranks, options.stage)
        found["set-up, seconds"][f"{layers} layers, {ranks} ranks"] = round(seconds, 2)
    for ranks in (64, 256, 4096):
        seconds = set_up(LAYERS, ranks, options.stage)
        found["set-up, seconds"][f"{LAYERS} layers, {ranks} ranks"] = round(seconds, 2)
    for ranks in (16, 64, 256, 1024, 4096):
        found["routing, milliseconds"][f"{ranks} ranks"] = round(route(ranks), 1)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
