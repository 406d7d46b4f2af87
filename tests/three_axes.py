"""One script for any layout of stages, layers that are shared out, and shards of data."""

from __future__ import annotations

from typing import Any

import torch
from drivetrain_moe import GroupedMLP, MoE
from tensor_decoder import RATE, ROWS, WIDTH, Block, Decoder, data
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.states.whole import whole

BLOCKS, MICRO_BATCHES = 4, 8
"""Blocks of the model; micro-batches of a step, of all shards of data together."""

Curve = list[tuple[float, float]]
"""Loss, and norm of the gradient before clipping, by step."""


class ExpertBlock(Block):
    """A block in which two of four experts compute each token, and none is dropped."""

    def __init__(self) -> None:
        super().__init__()
        del self.gate, self.up, self.down
        experts = GroupedMLP(4, WIDTH, 10, bias=True)
        plain: dict[str, Any] = {"drop_tokens": False, "top2_2nd_expert_sampling": False}
        self.moe = MoE(WIDTH, experts, 4, k=2, **plain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.first(x))
        output: torch.Tensor = self.moe(self.second(x))[0]
        return x + output


def with_experts() -> Decoder:
    """The decoder with experts in each block."""
    model = Decoder(0)
    model.blocks = nn.ModuleList(ExpertBlock() for _ in range(BLOCKS))
    return model


def make(
    pp: int,
    tp: int,
    dp: int,
    stage: int = 0,
    model: nn.Module | None = None,
    **changes: Any,
) -> Engine:
    """An engine of :class:`Decoder`; ``zero`` and ``pipeline`` are further keys of the sections.

    With fewer shards of data, each takes more micro-batches of a step.
    """
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **changes.pop("zero", {})}
    dtype = changes.pop("dtype", torch.float64)
    micro_batches = changes.pop("micro_batches", MICRO_BATCHES)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": micro_batches // dp,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": RATE, "momentum": 0.9}},
        "pipeline": {"stages": pp, **changes.pop("pipeline", {})},
        "tensor_parallel": {"autotp_size": tp},
        "zero_optimization": zero,
        **changes,
    }
    model = Decoder(BLOCKS) if model is None else model
    engine, *_ = drivetrain.initialize(model=model.to(dtype), config=config)
    assert engine.job.mesh.size("dp") == dp
    engine.get_global_grad_norm()
    return engine


def train(engine: Engine, begin: int, end: int) -> Curve:
    """Train from step ``begin`` up to ``end``."""
    curve = []
    dp, own = engine.job.mesh.size("dp"), engine.job.mesh.coordinate("dp")
    total = engine.gradient_accumulation_steps() * dp
    for step in range(begin, end):
        batches = [data(step * total + number) for number in range(own, total, dp)]
        loss = engine.train_batch(iter(batches))
        norm = engine.get_global_grad_norm()
        curve.append((loss.item(), float("nan") if norm is None else norm))
    return curve


def parameters(engine: Engine) -> dict[str, torch.Tensor]:
    """This rank's parameters as the client knows them."""
    with whole(engine.module):
        return {
            engine.job.parameters.info(p).name: p.detach().double().clone()
            for p in engine.module.parameters()
        }


def close(engine: Engine) -> None:
    engine.destroy()
    engine.job.close()


def alone(
    begin: int,
    end: int,
    clipping: float = 0.0,
    micro_batches: int = MICRO_BATCHES,
    model: nn.Module | None = None,
) -> tuple[Curve, dict[str, torch.Tensor]]:
    """The same with plain torch in one process: curve from ``begin`` on, and the parameters."""
    curve, model, _ = trained_alone(begin, end, clipping, micro_batches, model=model)
    return curve, {name: p.detach() for name, p in model.named_parameters()}


def trained_alone(
    begin: int,
    end: int,
    clipping: float = 0.0,
    micro_batches: int = MICRO_BATCHES,
    *,
    model: nn.Module | None = None,
    begun: tuple[nn.Module, torch.optim.Optimizer] | None = None,
) -> tuple[Curve, nn.Module, torch.optim.Optimizer]:
    """Curve from ``begin`` on, and what has been trained with plain torch.

    What has ``begun`` was trained up to ``begin``, and goes on from there.
    """
    model, curve = (Decoder(BLOCKS) if model is None else model).double(), []
    optimizer: torch.optim.Optimizer
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    total = micro_batches
    if begun is not None:
        model, optimizer = begun
    for step in range(0 if begun is None else begin, end):
        optimizer.zero_grad()
        loss = torch.stack([model(*data(step * total + n)) for n in range(total)]).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clipping or float("inf"))
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve if begun is not None else curve[begin:], model, optimizer
