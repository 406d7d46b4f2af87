"""Shards of gradients are divided as whole ones are: by ranks of ``data``, or by weights."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from drivetrain_zero import safe_get_full_grad
from torch import nn

import drivetrain
from drivetrain.contracts import Plugin, Section, Sections, hookimpl
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed
from drivetrain.testing.parts import SharedSequences

LENGTH, WIDTH, STEPS, RATE = 6, 3, 3, 0.05


class Tokens(nn.Module):
    """A model of single tokens; those whose target is NaN do not count."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Linear(WIDTH, 5, dtype=torch.float64)
        self.out = nn.Linear(5, 1, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counts = ~y.isnan()
        error = self.out(torch.tanh(self.inner(x))).squeeze(-1) - y.nan_to_num()
        return (error.square() * counts).sum(), counts.sum()


class ToySequenceSection(Section):
    pass


class ToySequence(Plugin):
    """Each rank of a sequence group computes with its part of the sequence."""

    name = "toy_sequence"
    sections: ClassVar[Sections] = {"toy_sequence": ToySequenceSection}

    @hookimpl
    def prepare_inputs(
        self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        size, place = engine.job.mesh.size("sp"), engine.job.mesh.coordinate("sp")
        return tuple(whole.chunk(size, dim=1)[place] for whole in args), kwargs


def data(step: int, micro: int, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1 + 100 * step + 10 * micro + shard)
    x = torch.randn(2, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.sin(3 * x.sum(-1))
    y[torch.rand(y.shape, generator=generator) < 0.4] = float("nan")
    if (step + micro) % 2:  # the first part of the sequence has nothing to learn from
        y[:, : LENGTH // 2] = float("nan")
    return x, y


def make(stage: int, micros: int, sp: int) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=Tokens(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": micros,
            "gradient_clipping": 0.0,
            "sequence_parallel_size": sp,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "toy_sequence": {},
        },
        registry=Registry.installed().with_plugins(ToySequence, SharedSequences),
    )
    return engine


Result = tuple[list[list[float]], list[float]]
"""The gradient of every step, and the parameters at the end; flat."""


def trained(micros: int, sp: int) -> list[Result]:
    found = []
    for stage in (1, 2, 3):
        engine, gradients = make(stage, micros, sp), []
        for step in range(STEPS):
            for micro in range(micros):
                total, count = engine(*data(step, micro, engine.job.mesh.coordinate("dp")))
                engine.backward(total / count if count else 0 * total, weight=count)
                if micro == micros - 1:
                    parts = [safe_get_full_grad(p) for p in engine.module.parameters()]
                    gradients.append(_flat(parts))
                engine.step()
        with drivetrain.whole(engine.module):
            found.append((gradients, _flat(engine.module.parameters())))
        engine.destroy()
    return found


def _flat(parts: Any) -> list[float]:
    return torch.cat([part.detach().flatten() for part in parts]).tolist()


def expected(shards: int, micros: int) -> Result:
    model, gradients = Tokens(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        parts = [model(*data(step, m, s)) for m in range(micros) for s in range(shards)]
        optimizer.zero_grad()
        (sum(total for total, _ in parts) / sum(count for _, count in parts)).backward()
        gradients.append(_flat(p.grad for p in model.parameters()))
        optimizer.step()
    return gradients, _flat(model.parameters())


@pytest.mark.parametrize(("dp", "sp", "micros"), [(1, 2, 1), (2, 1, 3), (2, 2, 3)])
def test_sharded_states_train_on_the_mean_over_all_tokens(dp: int, sp: int, micros: int) -> None:
    gradients, parameters = expected(dp, micros)
    for by_stage in run_distributed(trained, dp * sp, micros, sp):
        for seen, end in by_stage:
            assert end == pytest.approx(parameters, rel=1e-10)
            for mine, other in zip(seen, gradients, strict=True):
                assert mine == pytest.approx(other, rel=1e-10, abs=1e-14)


def differ() -> list[str]:
    said = []
    for stage in (1, 2, 3):
        engine = make(stage, 1, 1)
        total, count = engine(*data(0, 0, 0))
        engine.backward(total / count, weight=count if engine.job.rank == 0 else None)
        with pytest.raises(TrainingError) as caught:
            engine.step()
        said.append(str(caught.value))
        engine.destroy()
    return said


def test_ranks_that_differ_about_weights_are_told_at_every_stage() -> None:
    for said in run_distributed(differ, 2):
        assert all("weights on some ranks and none on others" in text for text in said)
        assert len(said) == 3
