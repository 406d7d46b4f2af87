"""Experts that are shared out, under every stage of ZeRO, offload, accumulation, recomputation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_moe import GroupedMLP, MoE
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

WIDTH, EXPERTS, LAYERS, RATE, MICRO = 6, 4, 2, 0.01, 2


class Block(nn.Module):
    def __init__(self, ep: int, idle: bool) -> None:
        super().__init__()
        grouped = GroupedMLP(EXPERTS, WIDTH, 8)
        modules = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        self.one = MoE(WIDTH, modules, EXPERTS, ep, k=2, drop_tokens=False, **PLAIN)
        self.other = MoE(WIDTH, grouped, EXPERTS, ep, drop_tokens=False, balance_loss=0.05)
        self.idle = idle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.one(self.seen(x))[0]
        return x + self.other(self.seen(x))[0]

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.ones_like(x[:, :1]), x[:, 1:].tanh()], 1) if self.idle else x


PLAIN = {"top2_2nd_expert_sampling": False}


class Model(nn.Module):
    """Two blocks; with ``idle`` every token goes to the first experts of each layer."""

    def __init__(self, ep: int = 1, idle: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Block(ep, idle) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 1)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
        if idle:
            for block in self.blocks:
                for layer in (block.one, block.other):
                    layer.gate.weight.data.zero_()
                    layer.gate.weight.data[:2, 0] = torch.tensor([3.0, 2.0])
        self.double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(x)
        for block in self.blocks:
            hidden = block(hidden)
        return (self.head(hidden).squeeze(-1) - y).square().sum() / 16


def tokens(step: int, micro: int, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shards have other numbers of tokens in every micro-batch; some have one, or none."""
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + shard)
    count = (9, 1, 0, 5)[(shard + micro) % 4]
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return x, torch.sin(3 * x.sum(-1))


def make(ep: int, config: dict[str, Any], idle: bool = False) -> Engine:
    own = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": RATE, "momentum": 0.9}},
    }
    return drivetrain.initialize(model=Model(ep, idle), config={**own, **config})[0]


def step_through(engine: Engine, begin: int, end: int) -> None:
    shard = engine.job.mesh.coordinate("dp")
    for step in range(begin, end):
        for micro in range(MICRO):
            engine.backward(engine(*tokens(step, micro, shard)))
            engine.step()


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    with drivetrain.whole(engine.module):
        return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def train(ep: int, configs: list[dict[str, Any]], idle: bool) -> list[dict[str, torch.Tensor]]:
    found = []
    for config in configs:
        engine = make(ep, config, idle)
        step_through(engine, 0, 3)
        found.append(state_of(engine))
        engine.destroy()
    return found


def reference(shards: int, idle: bool) -> dict[str, torch.Tensor]:
    """All experts in one process, with plain torch, every layer's balancing loss added by hand."""
    model = Model(idle=idle)
    balances: list[torch.Tensor] = []

    def note(_layer: nn.Module, _inputs: Any, outputs: Any) -> None:
        balances.append(outputs[1])

    for block in model.blocks:
        block.other.balance_loss = 0.0  # so that what is returned has a graph
        block.other.register_forward_hook(note)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        for micro in range(MICRO):
            for shard in range(shards):
                balances.clear()
                loss = model(*tokens(step, micro, shard)) + 0.05 * sum(balances)
                (loss / (MICRO * shards)).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def stage(number: int, **more: Any) -> dict[str, Any]:
    zero = {"stage": number, "stage3_param_persistence_threshold": 0, **more}
    return {"zero_optimization": zero}


CPU = {"device": "cpu"}
RELEASED = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
CONFIGS: list[dict[str, Any]] = [
    {},
    stage(1),
    stage(2),
    stage(3),
    stage(3, offload_optimizer=CPU, offload_param=CPU),
    {**stage(3), "activation_checkpointing": {"recompute": "all"}},
    {**stage(2), "activation_checkpointing": {"recompute": "all"}},
]


def claim(world: int, ep: int, configs: list[dict[str, Any]], idle: bool) -> None:
    expected = reference(world, idle)
    seen: set[str] = set()
    for ranks in run_distributed(train, world, ep, configs, idle):
        for config, found in zip(configs, ranks, strict=True):
            for name, value in found.items():
                torch.testing.assert_close(
                    value, expected[name], rtol=1e-7, atol=1e-9, msg=f"{config} {name}"
                )
            seen |= set(found)
    assert seen == set(expected)


def test_experts_on_two_ranks_train_as_one_process_at_every_stage() -> None:
    claim(2, 2, CONFIGS, idle=False)


def test_experts_without_tokens_neither_hang_nor_move() -> None:
    claim(2, 2, [stage(2), stage(3), CONFIGS[5]], idle=True)


@pytest.mark.long
@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_experts_on_four_ranks_train_as_one_process_at_every_stage(ep: int, idle: bool) -> None:
    claim(4, ep, CONFIGS, idle)


def test_copies_of_experts_train_as_one_process() -> None:
    # In some micro-batches two of the ranks have no rows for the second half, and their peers do.
    halves = {"moe": {"halves": True}, "cpu": {"shared_memory": False}}
    claim(4, 2, [stage(1), stage(3), {**stage(3, **RELEASED), **halves}], idle=False)


# -- checkpoints -----------------------------------------------------------------------------------


def save(folder: str) -> dict[str, torch.Tensor]:
    engine = make(2, stage(3))
    step_through(engine, 0, 2)
    engine.save_checkpoint(folder)
    step_through(engine, 2, 3)
    found = state_of(engine)
    engine.destroy()
    return found


def load(folder: str, ep: int, number: int) -> dict[str, torch.Tensor]:
    engine = make(ep, stage(number))
    engine.load_checkpoint(folder)
    step_through(engine, 2, 3)
    found = state_of(engine)
    engine.destroy()
    return found


def test_momentum_of_experts_reshards_to_other_ranks_and_stages(tmp_path: Path) -> None:
    run_distributed(save, 2, str(tmp_path))
    expected = reference(2, idle=False)
    for ep, number in ((1, 3), (2, 1)):
        for found in run_distributed(load, 2, str(tmp_path), ep, number):
            for name, value in found.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9)
