"""A script for DeepSpeed's mixture of experts runs as it is, and trains as plain torch does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from drivetrain.testing import run_distributed

WIDTH, EXPERTS, STEPS, RATE = 6, 4, 3, 0.1


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, WIDTH))


def values_of(module: nn.Module) -> None:
    """The same for both models, which have the same names."""
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2


def data(step: int, shard: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + shard)
    return torch.randn(5 + shard, WIDTH, generator=generator)


def script(stage: int) -> dict[str, torch.Tensor]:
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import (
        has_moe_layers,
        is_moe_param,
        split_params_into_different_moe_groups_for_optimizer,
    )
    from deepspeed.utils import groups

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(WIDTH, WIDTH)
            self.moe = MoE(
                hidden_size=WIDTH,
                expert=expert(),
                num_experts=EXPERTS,
                ep_size=2,
                k=1,
                drop_tokens=False,
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            output, l_aux, _ = self.moe(x)
            loss: torch.Tensor = (x + output).square().mean() + 0.01 * l_aux
            return loss

    net = Net()
    values_of(net)
    parameters = {"params": list(net.parameters()), "name": "parameters"}
    engine, *_ = deepspeed.initialize(
        model=net,
        model_parameters=split_params_into_different_moe_groups_for_optimizer(parameters),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "zero_optimization": {"stage": stage},
        },
    )
    rank = torch.distributed.get_rank()
    assert has_moe_layers(engine.module) == (True, EXPERTS)
    assert sum(is_moe_param(p) for p in engine.module.parameters()) == 4 * EXPERTS // 2
    assert groups.get_expert_parallel_world_size("ep_size_2") == 2
    for step in range(STEPS):
        engine.backward(engine(data(step, rank)))
        engine.step()
    found: dict[str, torch.Tensor] = engine.module_state_dict()
    engine.destroy()
    return found


class Dense(nn.Module):
    """Every token by its best expert, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.moe = nn.Module()
        self.moe.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.moe.experts = nn.ModuleDict({str(number): expert() for number in range(EXPERTS)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        scores = self.moe.gate(x).softmax(-1)
        best = scores.argmax(-1)
        output = [
            s[e] * self.moe.experts[str(int(e))](row)
            for s, e, row in zip(scores, best, x, strict=True)
        ]
        share = torch.bincount(best, minlength=EXPERTS) / len(x)
        l_aux = EXPERTS * (scores.mean(0) * share).sum()
        loss: torch.Tensor = (x + torch.stack(output)).square().mean() + 0.01 * l_aux
        return loss


@pytest.mark.parametrize("stage", [0, 2])
def test_a_script_with_experts_on_two_ranks_trains_as_plain_torch(stage: int) -> None:
    pytest.importorskip("deepspeed")
    model: Any = Dense()
    values_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.stack([model(data(step, shard)) for shard in range(2)]).mean().backward()
        optimizer.step()
    expected = model.state_dict()
    for found in run_distributed(script, 2, stage):
        assert set(found) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
