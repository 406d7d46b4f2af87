"""What an operator costs beside its kernel: Python, dispatch, autograd and an engine's hooks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain_cli.planning.measuring import time_operators
from drivetrain_cli.planning.walk import walking

if TYPE_CHECKING:
    from drivetrain.contracts import Accelerator

_LAYERS = 12
_STEPS = 10


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> None:
    loss = model(inputs).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _model(device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    layers = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(_LAYERS)]
    model = nn.Sequential(*layers).to(device)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, foreach=False)


def overhead_of(accelerator: Accelerator, seconds: float) -> float:
    """Seconds that a step of a model of no size takes, less its kernels', for each operator.

    Args:
        accelerator: whose device.
        seconds: about how long one kernel is measured.
    """
    device = accelerator.device(0)
    model, optimizer = _model(device)
    inputs = torch.randn(4, 8, device=device)
    taken = []
    for _ in range(_STEPS):
        begin = time.process_time()
        _step(model, optimizer, inputs)
        accelerator.synchronize()
        taken.append(time.process_time() - begin)
    meta, meta_optimizer = _model(torch.device("meta"))
    with walking() as walk:
        walk.begin(1)
        _step(meta, meta_optimizer, torch.empty(4, 8, device="meta"))
    ran = walk.operators.in_window(1)
    known = time_operators(ran, accelerator, min(seconds, 0.01))
    kernels = sum(known.get(o.signature, 0.0) * sum(o.calls.values()) for o in ran)
    return max(0.0, sorted(taken)[_STEPS // 2] - kernels) / max(1, walk.operators.moment)
