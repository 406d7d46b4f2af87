"""``eval_batch`` of the drop-in has the arguments of DeepSpeed's pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed

WIDTH, MICRO_BATCHES = 4, 3
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": MICRO_BATCHES,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(WIDTH, WIDTH) for _ in range(4)]


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(2, WIDTH, generator=generator), torch.randn(2, WIDTH, generator=generator))
        for _ in range(MICRO_BATCHES)
    ]


def staged() -> tuple[bool, float, Any, Any]:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    model = PipelineModule(layers(), num_stages=2, loss_fn=nn.functional.mse_loss)
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    loss, logits = engine.eval_batch(iter(batches()), return_logits=True)
    outputs = engine.eval_batch(iter(batches()), compute_loss=False, reduce_output=None)
    found = engine.is_last_stage(), loss.item(), logits, outputs
    engine.destroy()
    return found


def test_all_micro_batches_of_a_step_are_evaluated() -> None:
    model, losses, expected = nn.Sequential(*layers()), [], []
    with torch.no_grad():
        for x, y in batches():
            expected.append(model(x))
            losses.append(nn.functional.mse_loss(expected[-1], y))
    for is_last, loss, logits, outputs in run_distributed(staged, 2):
        assert loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
        if is_last:
            torch.testing.assert_close(logits, expected)
            torch.testing.assert_close(outputs, expected)
        else:
            assert logits is None
            assert outputs is None


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers())

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.layers(x), y)


def test_an_engine_without_pipeline_has_no_such_arguments() -> None:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=Alone(), config=CONFIG)
    assert engine.eval_batch(iter(batches())).item() > 0
    with pytest.raises(ConfigError, match="this engine has no pipeline"):
        engine.eval_batch(iter(batches()), return_logits=True)
    engine.destroy()
