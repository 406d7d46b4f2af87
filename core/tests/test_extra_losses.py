"""Terms that layers add to the loss, and values that they report, against plain torch."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import drivetrain
from drivetrain.contracts import Phase, Plugin, Section, Sections, StepReport, Transform, hookimpl
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.job.job import Job
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed
from drivetrain.testing.distributed import RanksFailedError
from drivetrain.testing.pipeline import LAYERS, Layers, ToyPipeline, data, loss_of

RATE, WIDTH, STEPS = 0.1, 4, 3
COEFFICIENT = 0.3


class Noisy(nn.Module):
    """A linear layer that would like its outputs to be small, and tells how large they are."""

    drivetrain_plugin = "toy_terms"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.job: Job | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.linear(x))
        if self.job is None:
            return y
        size = y.square().mean()
        if self.training:
            self.job.values.add("toy/size", size)
            self.job.values.add("toy/columns", y.mean(0))
        return self.job.losses.add(y, size, COEFFICIENT)


class Model(nn.Module):
    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.noisy = Noisy(WIDTH)
        self.head = nn.Linear(WIDTH, 1)
        self.double()
        self.way = way

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.way == "plain":
            hidden = self.noisy(x)
        else:
            x = x.requires_grad_(self.way == "reentrant")
            hidden = checkpoint(self.noisy, x, use_reentrant=self.way == "reentrant")
        return (self.head(hidden).squeeze(-1) - y).square().mean()


class ToyTermsSection(Section):
    pass


class ToyTerms(Plugin):
    """Gives layers the job, and keeps reports."""

    name = "toy_terms"
    sections: ClassVar[Sections] = {"toy_terms": ToyTermsSection}
    reports: ClassVar[list[StepReport]] = []

    @hookimpl
    def transform_module(self, job: Job, module: nn.Module) -> list[Transform]:
        def give(model: nn.Module) -> nn.Module:
            for part in model.modules():
                if isinstance(part, Noisy):
                    part.job = job
                    job.values.declare("toy/size")
                    job.values.declare("toy/columns", WIDTH)
            return model

        return [Transform(Phase.ADAPT, give)]

    @hookimpl
    def step_end(self, report: StepReport) -> None:
        self.reports.append(report)


REGISTRY = Registry.installed().with_plugins(ToyTerms, ToyPipeline)


def tokens(step: int, micro: int, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + shard)
    x = torch.randn(5, WIDTH, generator=generator, dtype=torch.float64)
    return x, x.sum(1).sin()


def weight_of(micro: int, shard: int) -> float:
    return 1.0 + micro + 3 * shard


def train(way: str, weighted: bool, micro_batches: int, extra: dict[str, Any]) -> dict[str, Any]:
    ToyTerms.reports.clear()
    engine, *_ = drivetrain.initialize(
        model=Model(way),
        config={
            "train_micro_batch_size_per_gpu": 5,
            "gradient_clipping": 0.0,
            "gradient_accumulation_steps": micro_batches,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            **extra,
        },
        registry=REGISTRY,
    )
    shard = engine.job.mesh.coordinate("dp")
    for step in range(STEPS):
        for micro in range(micro_batches):
            engine.eval()
            engine(*tokens(7, 7, 7))  # adds nothing
            engine.train()
            engine(*tokens(8, 8, 8))  # has no backward, so its term is of no loss
            loss = engine(*tokens(step, micro, shard))
            engine.backward(loss, weight=weight_of(micro, shard) if weighted else None)
            engine.step()
    reports = [(r.loss, dict(r.values)) for r in ToyTerms.reports]
    state = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    engine.destroy()
    return {"reports": reports, "state": state}


def alone(weighted: bool, micro_batches: int, shards: int) -> tuple[list[float], dict[str, Any]]:
    model, losses = Model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        terms, weights = [], []
        for micro in range(micro_batches):
            for shard in range(shards):
                x, y = tokens(step, micro, shard)
                loss = model(x, y) + COEFFICIENT * model.noisy(x).square().mean()
                weights.append(weight_of(micro, shard) if weighted else 1.0)
                terms.append(weights[-1] * loss)
        total = torch.stack(terms).sum() / sum(weights)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return losses, {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("way", "weighted", "extra"),
    [
        ("plain", False, {}),
        ("plain", True, {}),
        ("recomputed", False, {}),
        ("reentrant", True, {}),
    ],
)
def test_terms_are_part_of_the_loss_of_their_micro_batch(
    way: str, weighted: bool, extra: dict[str, Any]
) -> None:
    losses, state = alone(weighted, 2, 2)
    for found in run_distributed(train, 2, way, weighted, 2, extra):
        assert [loss for loss, _ in found["reports"]] == pytest.approx(losses, rel=1e-6)
        for name, value in state.items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-9, atol=1e-10)
        # The forward without backward counts in values, as nobody can know; three per micro-batch.
        values = found["reports"][0][1]
        assert set(values) == {"toy/size", "toy/columns"}
        model = Model()
        batches = [(0, m, s) for m in range(2) for s in range(2)] + [(8, 8, 8)] * 4
        outputs = torch.stack([model.noisy(tokens(*b)[0]) for b in batches])
        assert values["toy/size"] == pytest.approx(outputs.square().mean().item(), rel=1e-5)
        assert values["toy/columns"] == pytest.approx(outputs.mean((0, 1)).tolist(), abs=1e-6)


def loss_of_train_batch() -> tuple[float, float | None]:
    engine, *_ = drivetrain.initialize(
        model=Model(),
        config={
            "train_micro_batch_size_per_gpu": 5,
            "gradient_clipping": 0.0,
            "gradient_accumulation_steps": 2,
            "fp16": {"enabled": False},
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        },
        registry=REGISTRY,
    )
    shard = engine.job.mesh.coordinate("dp")
    loss = engine.train_batch(iter([tokens(0, micro, shard) for micro in range(2)])).item()
    report = engine.last_report
    engine.destroy()
    assert report is not None
    return loss, report.loss


def test_train_batch_returns_the_loss_with_its_terms() -> None:
    (expected, *_), _ = alone(False, 2, 2)
    for loss, reported in run_distributed(loss_of_train_batch, 2):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert reported == pytest.approx(expected, rel=1e-6)


# -- stages of a pipeline --------------------------------------------------------------------------


def noisy_layers() -> Layers:
    model = Layers()
    for number in range(LAYERS):
        model.layers[number].append(Term())
    return model


class Term(nn.Module):
    drivetrain_plugin = "toy_terms"
    job: Job | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.job is None else self.job.losses.add(x, x.square().mean(), COEFFICIENT)


def train_stages(split: str, precision: dict[str, Any]) -> dict[str, Any]:
    engine, *_ = drivetrain.initialize(
        model=noisy_layers(),
        config={
            "train_micro_batch_size_per_gpu": 3,
            "gradient_clipping": 0.0,
            "gradient_accumulation_steps": 4,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "toy_pipeline": {"stages": 2, "split": split},
            **precision,
        },
        registry=REGISTRY,
    )
    for part in engine.module.modules():
        if isinstance(part, Term):
            part.job = engine.job
    losses = []
    for step in data(STEPS, 4, 1):
        batches = iter([(x.float(), y) for micro in step for x, y in micro])
        losses.append(engine.train_batch(batches).item())
        assert engine.last_report is not None
        assert engine.last_report.loss == pytest.approx(losses[-1], rel=1e-6)
    info = engine.job.parameters.info
    state = {info(p).name: p.detach().clone() for p in engine.module.parameters()}
    engine.destroy()
    return {"losses": losses, "state": state}


@pytest.mark.parametrize(
    ("split", "precision", "rtol"),
    [
        ("no", {}, 1e-4),
        ("backward", {}, 1e-4),
        ("grad", {}, 1e-4),
        ("no", {"fp16": {"enabled": True, "loss_scale": 64.0}}, 3e-2),
    ],
)
def test_each_stage_adds_terms_of_its_own_layers(
    split: str, precision: dict[str, Any], rtol: float
) -> None:
    model, losses = Layers().double(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in data(STEPS, 4, 1):
        parts = []
        for micro in step:
            x, y = micro[0]
            for layer in model.layers:
                x = layer(x)
                parts.append(COEFFICIENT * x.square().mean())
            parts.append(loss_of(x, y))
        loss = torch.stack(parts).sum() / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expected = dict(model.named_parameters())
    held = set()
    for found in run_distributed(train_stages, 2, split, precision):
        assert found["losses"] == pytest.approx(losses, rel=rtol)
        for name, value in found["state"].items():
            torch.testing.assert_close(value.double(), expected[name], rtol=rtol, atol=rtol)
        held |= set(found["state"])
    assert held == set(expected)


# -- objects switch plugins on ---------------------------------------------------------------------


def test_the_class_of_a_module_switches_its_plugin_on() -> None:
    engine, *_ = drivetrain.initialize(
        model=Model(), config={"train_batch_size": 1}, registry=REGISTRY
    )
    plan = engine.job.plan
    assert any(isinstance(plugin, ToyTerms) for plugin in plan.plugins)
    reasons = [reason for reason, _ in plan.explain().plugins.values()]
    assert "the model has a Noisy" in reasons
    engine.destroy()


def test_a_job_without_a_model_says_which_section_is_missing() -> None:
    plan = drivetrain.Plan.build({"train_batch_size": 1}, registry=REGISTRY)
    with drivetrain.Job.open(plan) as job:
        message = r'a Noisy, which needs the plugin \'toy_terms\'.*write "toy_terms": \{\}'
        with pytest.raises(ConfigError, match=message):
            job.engine(Model())


def test_a_class_that_names_a_plugin_which_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="Noisy in the model: no plugin of that name"):
        drivetrain.initialize(
            model=Model(), config={"train_batch_size": 1}, registry=Registry.installed()
        )


# -- bad input -------------------------------------------------------------------------------------


def test_terms_and_values_of_wrong_shapes_are_refused() -> None:
    engine: Engine = drivetrain.initialize(
        model=Model(), config={"train_batch_size": 1}, registry=REGISTRY
    )[0]
    job = engine.job
    with pytest.raises(TrainingError, match=r"a scalar, got shape \(2,\)"):
        job.losses.add(torch.ones(1), torch.ones(2, requires_grad=True))
    with pytest.raises(TrainingError, match="'other' of 1 numbers is not known: declare it"):
        job.values.add("other", torch.ones(()))
    with pytest.raises(TrainingError, match="has 1 numbers, so it cannot have 2"):
        job.values.declare("toy/size", 2)
    engine.destroy()


def weights_on_the_last_stage_only() -> None:
    engine, *_ = drivetrain.initialize(
        model=noisy_layers(),
        config={
            "train_micro_batch_size_per_gpu": 3,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "toy_pipeline": {"stages": 2},
        },
        registry=REGISTRY,
    )
    for part in engine.module.modules():
        if isinstance(part, Term):
            part.job = engine.job
    output = engine(torch.ones(3, 6))
    if engine.job.mesh.coordinate("pp"):
        engine.backward(output.square().mean(), weight=2.0)
    else:
        engine.backward_from(output, torch.ones_like(output))
    engine.step()


def test_terms_without_the_weight_that_the_loss_has_are_refused() -> None:
    with pytest.raises(RanksFailedError, match=r"tell engine.*the weight"):
        run_distributed(weights_on_the_last_stage_only, 2)
