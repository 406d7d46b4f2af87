"""What a plugin for a mixture of experts needs of core: axes, partition, reduction, exchange."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.communication.functional import Functional, functional
from drivetrain.contracts import (
    Atom,
    AxisRequest,
    Phase,
    Plugin,
    PositiveInt,
    Section,
    Sections,
    SplitAxis,
    Transform,
    hookimpl,
)
from drivetrain.engine.engine import Engine
from drivetrain.job.job import Job
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed
from drivetrain.testing.parts import SharedSequences

STEPS, EXPERTS, WIDTH, TOKENS = 10, 4, 6, 16
ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
CLIPPING = 0.05


class Experts(nn.Module):
    """Token i goes to expert i modulo their number; its answer is weighed by a replicated gate.

    Once :attr:`ep` and :attr:`tp` are set, a rank has some of the experts and tokens travel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 1)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5) for _ in range(EXPERTS)
        )
        self.biases = nn.ParameterList(
            nn.Parameter(torch.randn(WIDTH) / 10) for _ in range(EXPERTS)
        )
        self.ep: Functional | None = None
        self.tp: Functional | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.sigmoid(self.gate(x))
        if self.ep is None or self.tp is None:
            return weight * _in_order(self._answers(_by_expert(x)))
        # Ranks of one tensor-parallel group have the same tokens, and each sends its part of them.
        sent = self.ep.all_to_all(_by_expert(self.tp.split(x)), split_dim=0, concat_dim=1)
        back = self.ep.all_to_all(self._answers(sent), split_dim=1, concat_dim=0)
        return weight * self.tp.gather(_in_order(back))

    def _answers(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [experts here, tokens of each, width] -> the same shape."""
        weights, biases = torch.stack(list(self.weights)), torch.stack(list(self.biases))
        return torch.tanh(torch.baddbmm(biases.unsqueeze(1), tokens, weights))


def _by_expert(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, EXPERTS, WIDTH).transpose(0, 1)


def _in_order(answers: torch.Tensor) -> torch.Tensor:
    return answers.transpose(0, 1).reshape(-1, WIDTH)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(3, WIDTH)
        self.experts = Experts()
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.stem(x))
        return (self.head(hidden + self.experts(hidden)).squeeze(-1) - y).square().mean()


class ToyExpertsSection(Section):
    ep: PositiveInt = 2
    tp: PositiveInt = 1


class ToyExperts(Plugin):
    """Expert parallelism, folded over tensor parallelism where there is any."""

    name = "toy_experts"
    sections: ClassVar[Sections] = {"toy_experts": ToyExpertsSection}

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        section = self.section(ToyExpertsSection)
        return [Atom("tp", section.tp), SplitAxis("ep", section.ep, within=("tp", "sp", "dp"))]

    @hookimpl
    def transform_module(self, job: Job, module: nn.Module) -> Sequence[Transform]:
        def keep_own(model: nn.Module) -> nn.Module:
            for layer in model.modules():
                if isinstance(layer, Experts):
                    self._partition(job, layer)
            return model

        return [Transform(Phase.PARTITION, keep_own)]

    @staticmethod
    def _partition(job: Job, layer: Experts) -> None:
        own = EXPERTS // job.mesh.size("ep")
        first = own * job.mesh.coordinate("ep")
        layer.ep, layer.tp = (functional(job.communicator, axis) for axis in ("ep", "tp"))
        # Weights are kept, with the names that they have; biases are replaced by others.
        layer.weights = nn.ParameterList(layer.weights[first : first + own])
        copies = []
        for old in layer.biases[first : first + own]:
            copies.append(nn.Parameter(old.detach().clone()))
            job.parameters.replace(old, copies[-1])
        layer.biases = nn.ParameterList(copies)

    @hookimpl
    def describe_parameters(self, job: Job, module: nn.Module) -> None:
        experts = {
            parameter
            for layer in module.modules()
            if isinstance(layer, Experts)
            for parameter in (*layer.weights, *layer.biases)
        }
        for parameter in module.parameters():
            info = job.parameters.info(parameter)
            if parameter in experts:
                info.reduction, info.distinct = "edp", ("ep",)


def tokens(step: int, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + shard)
    x = torch.randn(TOKENS, 3, generator=generator)
    return x, torch.sin(3 * x.sum(-1))


def make(ep: int, sp: int, tp: int) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=Model(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": CLIPPING,
            "optimizer": {"type": "AdamW", "params": ADAMW},
            "sequence_parallel_size": sp,
            "data_parallel": {"bucket_bytes": 128, "first_bucket_bytes": 64},
            "toy_experts": {"ep": ep, "tp": tp},
        },
        registry=Registry.installed().with_plugins(ToyExperts, SharedSequences),
    )
    return engine


Curve = list[tuple[float, float]]
"""Loss and norm of the gradient before clipping, by step."""


def train(engine: Engine, begin: int, end: int) -> Curve:
    job, curve = engine.job, []
    sp, shards = job.mesh.size("sp"), job.mesh.size("dp")
    for step in range(begin, end):
        x, y = (
            whole.chunk(sp)[job.mesh.coordinate("sp")]
            for whole in tokens(step, job.mesh.coordinate("dp"))
        )
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        mean = functional(job.communicator, "data").all_reduce(loss.detach()) / (shards * sp)
        norm = engine.get_global_grad_norm()
        assert norm is not None
        curve.append((mean.item(), norm))
    return curve


def reference(shards: int) -> tuple[Curve, dict[str, torch.Tensor]]:
    """The same training in one process, with nothing but torch: curve, parameters by name."""
    model, curve = Model(), []
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for step in range(STEPS):
        loss = torch.stack([model(*tokens(step, shard)) for shard in range(shards)]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        assert norm > CLIPPING
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve, {name: p.detach() for name, p in model.named_parameters()}


def named(engine: Engine) -> dict[str, torch.Tensor]:
    infos: Any = engine.job.parameters.info
    return {infos(p).name: p.detach().clone() for p in engine.module.parameters()}


# -- functions that run on every rank --------------------------------------------------------------


def train_experts(ep: int, sp: int, tp: int) -> tuple[Curve, dict[str, torch.Tensor]]:
    engine = make(ep, sp, tp)
    curve, parameters = train(engine, 0, STEPS), named(engine)
    engine.destroy()
    return curve, parameters


def save_after_five(folder: str) -> Curve:
    engine = make(ep=2, sp=1, tp=1)
    train(engine, 0, 5)
    engine.save_checkpoint(folder)
    curve = train(engine, 5, STEPS)
    engine.destroy()
    return curve


def load_and_go_on(folder: str, ep: int, sp: int, tp: int) -> Curve:
    engine = make(ep, sp, tp)
    engine.load_checkpoint(folder)
    curve = train(engine, 5, STEPS)
    engine.destroy()
    return curve


# -- claims ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "ep", "sp", "tp"),
    [
        pytest.param(1, 1, 1, 1, id="one rank"),
        pytest.param(2, 2, 1, 1, id="experts over dp"),
        pytest.param(4, 2, 1, 1, id="experts over half of dp"),
        pytest.param(2, 2, 2, 1, id="experts over sp"),
        pytest.param(4, 2, 2, 1, id="experts over sp, copies over dp"),
        pytest.param(4, 4, 2, 1, id="experts over dp x sp"),
        pytest.param(2, 2, 1, 2, id="experts folded over tp"),
        pytest.param(4, 2, 1, 2, id="experts folded over tp, copies over dp"),
        pytest.param(4, 4, 1, 2, id="experts folded over tp and dp"),
        pytest.param(4, 2, 2, 2, id="experts folded over tp, copies over sp"),
    ],
)
def test_partitioned_experts_train_like_one_process(world: int, ep: int, sp: int, tp: int) -> None:
    expected, trained = reference(shards=world // (sp * tp))
    held = []
    for curve, parameters in run_distributed(train_experts, world, ep, sp, tp):
        assert curve == [pytest.approx(point, rel=1e-5) for point in expected]
        for name, values in parameters.items():
            torch.testing.assert_close(values, trained[name], rtol=1e-5, atol=1e-6)
        held.append(set(parameters))
        assert len([name for name in parameters if "weights" in name]) == EXPERTS // ep
    assert set().union(*held) == set(trained)


@pytest.mark.parametrize(("ep", "sp", "tp"), [(2, 1, 1), (4, 1, 1), (1, 1, 1)])
def test_experts_saved_on_some_ranks_load_onto_others(
    ep: int, sp: int, tp: int, tmp_path: Path
) -> None:
    straight = run_distributed(save_after_five, 4, str(tmp_path))
    for resumed in run_distributed(load_and_go_on, 4, str(tmp_path), ep, sp, tp):
        assert resumed == [pytest.approx(point, rel=1e-5) for point in straight[0]]
