"""When transforms of a module run, what they are told, and where the module is meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from halves import Halves, Net
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

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
from drivetrain.job.accelerator_choice import HostAccelerator
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
        *(Phase.ADAPT, Phase.PARTITION),
        "describe",
        Phase.RECOMPUTE,
        "states",
        *(Phase.COMPILE, Phase.SURROUND),
    ]


class Small(HostAccelerator):
    """A device with memory of its own, in which :class:`Limit` looks at every tensor."""

    name = "small"

    def device(self, local_rank: int) -> torch.device:
        return torch.device("meta")


class Limit(TorchDispatchMode):
    """Runs out of memory at a tensor with more elements than ``numel`` on the small device."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                self.largest = max(self.largest, leaf.numel())
                if leaf.numel() > self.numel:
                    raise MemoryError(f"{leaf.numel()} elements on a device with {self.numel}")
        return found


def test_what_is_cut_on_the_host_is_never_whole_on_the_device() -> None:
    width = 1 << 12  # of whole weights [width, 4] and [4, width]
    registry = Registry.installed().with_plugins(Halves)
    registry.add("accelerators", "small", Small)
    config = {"train_batch_size": 1, "accelerator": "small", "halves": {"parts": 2}}
    module = Net(width)
    with (
        Job.open(Plan.build(config, world_size=1, registry=registry)) as job,
        Limit(2 * width) as limit,
    ):
        engine = job.engine(module)
    assert limit.largest == 2 * width
    assert {parameter.device.type for parameter in engine.module.parameters()} == {"meta"}
    assert engine.module.head.weight is engine.module.tokens.weight
    names = {job.parameters.info(p).name for p in engine.module.parameters()}
    assert names == {name for name, _ in Net().named_parameters()}


def test_an_optimizer_of_the_client_is_training_too() -> None:
    Recorder.events.clear()
    module = nn.Linear(2, 2)
    with job_of(Recorder) as job:
        job.engine(module, torch.optim.SGD(module.parameters(), lr=0.1))
    assert Recorder.events[0] is True
