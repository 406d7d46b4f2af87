"""The plugin behind ``memory_snapshot``."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from drivetrain.contracts import Plugin, Sections, hookimpl
from drivetrain_profiler.memory.section import PATH, MemorySnapshotSection

if TYPE_CHECKING:
    import torch

    from drivetrain.engine.engine import Engine
    from drivetrain_profiler.memory.step import StepMemory

_steps: WeakKeyDictionary[Engine, StepMemory] = WeakKeyDictionary()


class MemorySnapshot(Plugin):
    """Watches the memory of one step of each engine that trains."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: MemorySnapshotSection}

    @hookimpl
    def prepare_inputs(self, engine: Engine) -> None:
        step = self._of(engine)
        if step is not None and engine.module.training:
            step.prepare()

    @hookimpl(wrapper=True)
    def backward(
        self, engine: Engine, tensors: Sequence[torch.Tensor]
    ) -> Generator[None, Any, Any]:
        step = self._of(engine)
        if step is None:
            return (yield)
        with step.backward(tensors):
            return (yield)

    @hookimpl(wrapper=True)
    def optimizer_step(self, engine: Engine) -> Generator[None, Any, Any]:
        step = self._of(engine)
        if step is None:
            return (yield)
        with step.boundary():
            return (yield)

    def _of(self, engine: Engine) -> StepMemory | None:
        """What watches an engine, as long as it is not done."""
        section = self.section(MemorySnapshotSection)
        if not section.enabled or engine.optimizer is None or engine.device.type == "meta":
            return None
        step = _steps.get(engine)
        if step is None:
            from drivetrain_profiler.memory.step import StepMemory

            step = _steps[engine] = StepMemory(engine, section)
        return None if step.done else step
