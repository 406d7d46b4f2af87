"""Jobs and data of tests with tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from toy_tensor_parallel import Model, ToyTensorParallel

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.plan.registry import Registry

ROWS, RATE = 3, 0.1


def make(
    stage: int, tp: int, clipping: float = 0.0, model: nn.Module | None = None, **changes: Any
) -> Engine:
    """An engine of :class:`Model` in float64; ``zero`` are further keys of its section."""
    zero = {"stage3_param_persistence_threshold": 0, **changes.pop("zero", {})}
    engine, *_ = drivetrain.initialize(
        model=model or Model().double(),
        config={
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_clipping": clipping,
            "optimizer": {"type": "SGD", "params": {"lr": RATE, "momentum": 0.9}},
            "zero_optimization": {"stage": stage, **zero},
            "data_parallel": {"bucket_bytes": 256, "first_bucket_bytes": 64},
            "toy_tensor_parallel": {"tp": tp},
            **changes,
        },
        registry=Registry.installed().with_plugins(ToyTensorParallel),
    )
    return engine


def data(step: int, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + shard)
    x = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
    return x, torch.sin(3 * x.sum(-1))
