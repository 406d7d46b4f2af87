"""Scripts read and write states of one parameter at a time, whichever stages share it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensor_decoder import VOCABULARY, WIDTH, Decoder
from three_axes import RATE, close, make, parameters, train, trained_alone
from torch import nn

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.errors import TrainingError
from drivetrain.testing import run_distributed

FACTOR = 1.5


def scaled(layout: tuple[int, int, int], stage: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One step, all weights and their momentum scaled parameter by parameter, one more step."""
    from drivetrain_zero import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    engine = make(*layout, stage)
    losses = [loss for loss, _ in train(engine, 0, 1)]
    for parameter in engine.module.parameters():
        value = safe_get_full_fp32_param(parameter)
        momentum = safe_get_full_optimizer_state(parameter, "momentum_buffer")
        assert value is not None
        assert momentum is not None
        safe_set_full_fp32_param(parameter, value * FACTOR)
        safe_set_full_optimizer_state(parameter, momentum * FACTOR, "momentum_buffer")
    losses += [loss for loss, _ in train(engine, 1, 2)]
    found = parameters(engine)
    close(engine)
    return losses, found


def scaled_alone() -> tuple[list[float], dict[str, torch.Tensor]]:
    first, model, optimizer = trained_alone(0, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(FACTOR)
            optimizer.state[parameter]["momentum_buffer"].mul_(FACTOR)
    curve, model, _ = trained_alone(1, 2, begun=(model, optimizer))
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return [loss for loss, _ in (*first, *curve)], found


@pytest.mark.parametrize(
    ("layout", "stage"), [((2, 2, 1), 1), ((2, 2, 1), 3), ((2, 1, 2), 2), ((2, 1, 2), 3)]
)
def test_states_are_written_parameter_by_parameter(
    layout: tuple[int, int, int], stage: int
) -> None:
    expected, trained = scaled_alone()
    for losses, found in run_distributed(scaled, 4, layout, stage, timeout=60):
        assert losses == pytest.approx(expected, rel=1e-8)
        for name, values in found.items():
            torch.testing.assert_close(values, trained[name], rtol=1e-8, atol=1e-10)


class TwiceTied(Decoder):
    """The last norm has the scale of a first one, besides the head's being the embedding."""

    def __init__(self) -> None:
        super().__init__(2)
        tokens = self.tokens
        del self.tokens
        self.first, self.tokens = nn.LayerNorm(WIDTH), tokens  # as the last stage has them
        self.norm.weight = self.first.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.first(self.tokens(tokens))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def in_two_orders(stage: int, writes: bool) -> str:
    from drivetrain_zero import safe_get_full_fp32_param, safe_set_full_fp32_param

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "zero_optimization": {"stage": stage},
        "pipeline": {"stages": 2},
        "tensor_parallel": {"autotp_size": 2},
    }
    torch.manual_seed(0)
    engine, *_ = drivetrain.initialize(model=TwiceTied().double(), config=config)
    tied = [
        p
        for p in engine.module.parameters()
        if p.shape[-1] == WIDTH and engine.job.parameters.info(p).reduction != "data"
    ]
    assert len(tied) == 2
    if Ranks.current().rank >= 2:
        tied.reverse()
    try:
        for parameter in tied:
            if writes:
                safe_set_full_fp32_param(parameter, torch.zeros(VOCABULARY, WIDTH))
            else:
                safe_get_full_fp32_param(parameter)
    except TrainingError as error:
        return str(error)
    finally:
        close(engine)
    return ""


@pytest.mark.parametrize("writes", [False, True])
def test_another_order_on_another_stage_is_refused_on_every_rank(writes: bool) -> None:
    for said in run_distributed(in_two_orders, 4, 1, writes, timeout=60):
        assert "something else on another one that shares it" in said
