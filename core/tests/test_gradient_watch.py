"""A plugin sees each rank's own gradients before they are summed, every one of them once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import GradientWatch, Plugin, hookimpl
from drivetrain.job.job import Job
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed

seen: dict[nn.Parameter, torch.Tensor] = defaultdict(lambda: torch.zeros(()))


class Watching(Plugin):
    name = "watching"

    @hookimpl
    def watch_gradients(self, job: Job) -> Sequence[GradientWatch]:
        def watch(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
            seen[parameter] = seen[parameter] + gradient

        return [watch]


class Model(nn.Module):
    """One layer accumulates inside and outside a re-entrant checkpoint, one has no part in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        # First here is last to be reduced, so what it lacks keeps no other waiting.
        self.idle, self.shared, self.head = nn.Linear(4, 1), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.shared(x))
        x = checkpoint(lambda y: torch.tanh(self.shared(y)), x, use_reentrant=True)
        return self.head(x).sum()


def inputs(micro_step: int, rank: int) -> torch.Tensor:
    seed = 100 * micro_step + rank
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))


def watched(keys: dict[str, Any], accumulation: int, steps: int) -> list[dict[str, torch.Tensor]]:
    """By step what the watch has seen on this rank, next to what plain autograd gives."""
    module = Model()
    engine, *_ = drivetrain.initialize(
        model=module,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": accumulation,
            "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
            "plugins": {"watching": True},
            "data_parallel": {"bucket_bytes": 64, "first_bucket_bytes": 16},
            **keys,
        },
        registry=Registry.installed().with_plugins(Watching),
    )
    found = []
    for step in range(steps):
        seen.clear()
        for micro in range(accumulation):
            x = inputs(step * accumulation + micro, Ranks.current().rank)
            engine.backward(engine(x))
            engine.step()
        names = {p: engine.job.parameters.info(p).name for p in module.parameters()}
        found.append({names[parameter]: value.clone() for parameter, value in seen.items()})
    engine.destroy()
    return found


@pytest.mark.parametrize(("accumulation", "world"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("keys", [{}, {"gradient_predivide_factor": 4.0}], ids=["", "predivided"])
def test_what_is_seen_is_each_ranks_own_sum(
    keys: dict[str, Any], accumulation: int, world: int
) -> None:
    steps = 3  # from the second on, the bucket that was late waits for the end
    answers = run_distributed(watched, world, keys, accumulation, steps)
    for rank, answer in enumerate(answers):
        for step, found in enumerate(answer):
            model = Model()
            for micro in range(accumulation):
                model(inputs(step * accumulation + micro, rank)).backward()
            expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            assert set(found) == set(expected) == {n for n in expected if "idle" not in n}
            for name, values in found.items():
                torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-6)
