"""Watches the memory of one step of an engine, and writes down what there is at its peak."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from drivetrain_profiler.memory.peak import Peak, peak_of
from drivetrain_profiler.memory.watch import (
    GRADIENTS,
    PARAMETERS,
    MemoryWatch,
    resizes_seen,
)
from drivetrain_profiler.places import ModuleHooks

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain_profiler.memory.section import MemorySnapshotSection

logger = logging.getLogger("drivetrain.profiler")

_HISTORY = 100_000
"""Events that the allocator's history keeps."""

_KINDS = {"parameter": PARAMETERS, "gradient": GRADIENTS, "master": "master weights"}


class StepMemory:
    """Watches an engine in the step that the config names.

    Args:
        engine: whose step.
        section: the settings.

    Attributes:
        done: nothing more is to be watched.
    """

    def __init__(self, engine: Engine, section: MemorySnapshotSection) -> None:
        proxy: Any = weakref.proxy(engine)  # whose snapshot lives as long as it does
        self._engine: Engine = proxy
        self._section = section
        self._watch: MemoryWatch | None = None
        self._hooks: ModuleHooks | None = None
        self._forward, self._step = ExitStack(), ExitStack()
        self._begin, self._begun, self._rank = 0, 0, engine.job.rank
        self._history = _history_of(engine.device) if section.history else None
        self.done = False
        engine.job.on_close(self._close)

    def prepare(self) -> None:
        """A forward comes."""
        step = self._engine.global_steps
        self._begun = step + 1
        if step > self._section.step:  # resumed beyond it
            self._tell_if_missed()
            self.done = True
        elif step == self._section.step and self._watch is None:
            self._start()

    @contextmanager
    def backward(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Around a backward pass from ``tensors``."""
        watch = self._watch
        if watch is None:
            yield
            return
        watch.look_at_graph(tensors)
        with watch:
            yield
        for name, parameter in self._engine.module.named_parameters():
            if parameter.grad is not None:
                watch.see(parameter.grad)
                watch.know(parameter.grad, GRADIENTS, name)

    @contextmanager
    def boundary(self) -> Iterator[None]:
        """Around the update that ends a step."""
        watch = self._watch
        if watch is None:
            yield
            return
        watch.updates = True
        with watch:
            yield
        try:
            self._write(self._found(watch))
        finally:
            self._stop()
            self.done = True

    def _start(self) -> None:
        engine = self._engine
        watch = self._watch = MemoryWatch(engine.device)
        watch.look_around()
        self._know(watch)
        self._begin = len(watch.changes)
        engine.job.accelerator.reset_peak_memory()
        if self._history is not None:
            self._history._record_memory_history(max_entries=_HISTORY)
        self._step.enter_context(resizes_seen(watch))
        self._hooks = ModuleHooks(engine.module.named_modules(), self._enter, self._leave)

    def _stop(self) -> None:
        self._forward.close()
        self._step.close()
        if self._hooks is not None:
            self._hooks.remove()
        if self._watch is not None:
            self._watch.forget()
            if self._history is not None:
                self._history._record_memory_history(enabled=None)
        self._watch = self._hooks = None

    def _know(self, watch: MemoryWatch) -> None:
        """Say what the memory is for that stays between two steps."""
        engine = self._engine
        for name, parameter in engine.module.named_parameters():
            watch.know(parameter.data, PARAMETERS, name)
            if parameter.grad is not None:
                watch.know(parameter.grad, GRADIENTS, name)
        for name, buffer in engine.module.named_buffers():
            watch.know(buffer, "buffers", name)
        for fragment in engine.states.fragments():
            if fragment.home == "device" and fragment.boxes:
                kind = _KINDS.get(fragment.kind, f"optimizer: {fragment.kind}")
                watch.know(fragment.read(), kind, fragment.name)

    def _enter(self, name: str) -> None:
        if self._watch is None or not self._engine.module.training:
            return
        if not name:
            self._forward.enter_context(self._watch)
        self._watch.places.enter(name)

    def _leave(self, name: str) -> None:
        if self._watch is None or not self._engine.module.training:
            return
        self._watch.places.leave(name)
        if not name:
            self._forward.close()

    def _found(self, watch: MemoryWatch) -> Peak:
        engine = self._engine
        most, at, there, curve = peak_of(watch.pieces, watch.changes, begin=self._begin)
        return Peak(
            step=self._section.step + 1,
            rank=self._rank,
            device=str(engine.device),
            nbytes=most,
            begin=curve[0],
            counted=engine.job.accelerator.max_memory_allocated(),
            phase=at.phase,
            module=at.module,
            operator=at.operator,
            pieces=there,
            curve=curve,
        )

    def _write(self, peak: Peak) -> None:
        folder, name = Path(self._section.path), f"rank{self._rank}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(peak.data()), "utf-8")
            (folder / f"{name}.txt").write_text(peak.text(self._section.top), "utf-8")
            if self._history is not None:
                self._history._dump_snapshot(str(folder / f"{name}.pickle"))
        except OSError as error:  # no reason to end training
            logger.warning("the memory snapshot cannot be written: %s", error)
            return
        if self._rank == 0:
            logger.info(
                "step %d has %d bytes of tensors at its peak: see %s",
                peak.step,
                peak.nbytes,
                folder / f"{name}.txt",
            )

    def _close(self) -> None:
        self._stop()
        self._tell_if_missed()

    def _tell_if_missed(self) -> None:
        """Say that there is no snapshot, where somebody may wait for one."""
        if not self.done and self._begun and self._rank == 0:
            comes = "begins after" if self._begun > self._section.step + 1 else "ended before"
            logger.warning(
                "memory_snapshot.step is %d, but this run %s its end (in its step %d), so there is "
                "no snapshot",
                self._section.step,
                comes,
                self._begun,
            )


def _history_of(device: torch.device) -> Any | None:
    """The module with which torch writes down what an allocator does; ``None`` if none does."""
    if device.type in ("cpu", "meta"):
        return None
    memory = getattr(torch.get_device_module(device.type), "memory", None)
    return memory if hasattr(memory, "_record_memory_history") else None
