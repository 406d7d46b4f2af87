"""When transforms of a module run, what they are told, and where the module is meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from drivetrain.contracts import (
    ModelStates,
    OptimizerPlan,
    Phase,
    Plugin,
    Section,
    Sections,
    Transform,
    hookimpl,
)
from drivetrain.engine.engine import Engine
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry

SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


class Recorder(Plugin):
    """Notes what is asked of it, and when."""

    name = "recorder"
    sections: ClassVar[Sections] = {"recorder": Section}
    events: ClassVar[list[Any]] = []

    @hookimpl
    def transform_module(self, module: nn.Module, training: bool) -> Sequence[Transform]:
        def note(phase: Phase) -> Transform:
            def apply(module: nn.Module) -> nn.Module:
                self.events.append(phase)
                return module

            return Transform(phase, apply)

        self.events.append(training)
        return [note(phase) for phase in reversed(Phase)]

    @hookimpl
    def describe_parameters(self) -> None:
        self.events.append("describe")

    @hookimpl
    def build_model_states(self, optimizer: OptimizerPlan | None) -> ModelStates | None:
        self.events.append("states")
        return None


def job_of(plugin: type[Plugin], **config: Any) -> Job:
    registry = Registry.installed().with_plugins(plugin)
    given = {"train_batch_size": 1, plugin.name: {}, **config}
    return Job.open(Plan.build(given, world_size=1, registry=registry))


@pytest.mark.parametrize("training", [True, False])
def test_phases_run_around_description_and_states(training: bool) -> None:
    Recorder.events.clear()
    with job_of(Recorder, **(SGD if training else {})) as job:
        engine: Engine = job.engine(nn.Linear(2, 2))
    assert (engine.optimizer is not None) is training
    assert Recorder.events == [
        training,
        *(Phase.ADAPT, Phase.PARTITION, Phase.RECOMPUTE),
        *("describe", "states"),
        *(Phase.COMPILE, Phase.SURROUND),
    ]


def test_an_optimizer_of_the_client_is_training_too() -> None:
    Recorder.events.clear()
    module = nn.Linear(2, 2)
    with job_of(Recorder) as job:
        job.engine(module, torch.optim.SGD(module.parameters(), lr=0.1))
    assert Recorder.events[0] is True
