"""The profile of one step of an engine: counted in one step, timed in the next, then reported."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.contracts import Purpose, Tag
from drivetrain_profiler.counter import OperationCounter
from drivetrain_profiler.measured import ModuleFigures, ModuleTimer, figures
from drivetrain_profiler.places import ModuleHooks
from drivetrain_profiler.profiler import write
from drivetrain_profiler.report import Summary, duration, profile_text, scaled

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain_profiler.sections import FlopsProfilerSection

logger = logging.getLogger("drivetrain.profiler")

_DIVIDED = ("pp", "tp", "sp")
"""Axes along which ranks share the work of one model."""


class StepProfile:
    """Profiles an engine at the step that the config names; before and after, it costs nothing.

    Operations are counted in the step before, since counting takes time; all ranks count, because
    ranks of one model are added up.

    Args:
        engine: whose forwards and backwards.
        section: the settings.
    """

    def __init__(self, engine: Engine, section: FlopsProfilerSection) -> None:
        proxy: Any = weakref.proxy(engine)  # whose profile lives as long as it does
        self._engine: Engine = proxy
        self._section = section
        self._counted, self._timed = max(0, section.profile_step - 1), section.profile_step
        self._counter = OperationCounter()
        self._timer = ModuleTimer(engine.job.accelerator.synchronize)
        self._hooks: ModuleHooks | None = None
        self._forward = ExitStack()
        self._active = False
        self._backward = self._update = 0.0
        self._forwards = {"counted": 0, "timed": 0}
        self._begun, self._rank = 0, engine.job.rank
        self.done = False
        engine.job.on_close(self._tell_if_missed)

    def prepare(self) -> None:
        """A forward comes."""
        step = self._engine.global_steps
        self._begun = step + 1
        if step > self._timed:  # resumed beyond it
            self._tell_if_missed()
            self.done = True
        elif self._hooks is None and self._counted <= step:
            modules = self._engine.module.named_modules()
            self._hooks = ModuleHooks(modules, self._enter, self._leave)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Around a backward pass."""
        if self._hooks is None:
            yield
            return
        wait = self._engine.job.accelerator.synchronize
        with ExitStack() as counting:
            if self._counts:
                counting.enter_context(self._counter)
            wait()
            begun = time.perf_counter()
            yield
            wait()
        self._backward += (time.perf_counter() - begun) * self._times

    @contextmanager
    def boundary(self) -> Iterator[None]:
        """Around the update that ends a step."""
        wait = self._engine.job.accelerator.synchronize
        if self._hooks is None:
            yield
            return
        wait()
        begun = time.perf_counter()
        yield
        wait()
        self._update += (time.perf_counter() - begun) * self._times
        self._hooks.remove()
        self._hooks = None
        if self._times:
            self._report()
            self.done = True

    @property
    def _counts(self) -> bool:
        return self._engine.global_steps == self._counted

    @property
    def _times(self) -> bool:
        return self._engine.global_steps == self._timed

    def _tell_if_missed(self) -> None:
        """Say that there is no profile, where somebody may wait for one."""
        if not self.done and self._begun and self._rank == 0:
            comes = "begins after" if self._begun > self._timed + 1 else "ended before"
            logger.warning(
                "flops_profiler.profile_step is %d, but this run %s it (in its step %d), so no "
                "step was profiled",
                self._section.profile_step,
                comes,
                self._begun,
            )

    def _enter(self, name: str) -> None:
        if not name:
            self._active = self._engine.module.training  # an evaluation in between is no part of it
            if self._active and self._counts:
                self._forward.enter_context(self._counter)
            self._forwards["counted"] += self._active and self._counts
            self._forwards["timed"] += self._active and self._times
        if self._active and self._times:
            self._timer.enter_module(name)
        if self._active and self._counts:
            self._counter.enter_module(name)

    def _leave(self, name: str) -> None:
        if self._active and self._counts:
            self._counter.leave_module(name)
        if self._active and self._times:
            self._timer.leave_module(name)
        if not name:
            self._forward.close()

    def _report(self) -> None:
        engine, section = self._engine, self._section
        found = figures(engine.module, self._counter, self._timer)
        facts = {**self._facts(found), **self._whole_model(found)}
        if engine.job.rank == 0:
            title = f"profile of step {self._timed + 1}, {self._forwards['timed']} micro-batches"
            summary = Summary(title, facts, self._counter.unknown)
            text = profile_text(
                found,
                summary,
                depth=section.module_depth,
                top=section.top_modules,
                detailed=section.detailed,
            )
            try:
                write(text, section.output_file)
            except OSError as error:  # no reason to end training, as the text can go elsewhere
                logger.warning("the profile cannot be written (%s), so it stands here", error)
                write(text, None)

    def _facts(self, found: ModuleFigures) -> dict[str, str]:
        engine, job = self._engine, self._engine.job
        seconds = found.seconds + self._backward + self._update
        sizes = {axis: job.mesh.size(axis) for axis in ("dp", *_DIVIDED)}
        worlds = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        facts = {
            "ranks": f"{job.world_size}" + (f" ({worlds})" if worlds else ""),
            "micro-batch": f"{engine.train_micro_batch_size_per_gpu()} samples",
        }
        if self._backward:
            facts["backward time"] = duration(self._backward)
        else:
            facts["backward"] = "not seen: the script calls loss.backward() itself"
        facts["update time"] = duration(self._update)
        facts["step"] = (
            f"{duration(seconds)}, {scaled(engine.train_batch_size() / seconds, 'samples/s')}"
        )
        return facts

    def _whole_model(self, found: ModuleFigures) -> dict[str, str]:
        """Sums over the ranks that share one model. Collective along the axes that divide it."""
        job = self._engine.job
        axes = [axis for axis in _DIVIDED if job.mesh.size(axis) > 1]
        if not axes:
            return {}
        own = (found.forward.flops, found.backward.flops + found.recompute.flops)
        sums = torch.tensor(own, dtype=torch.int64, device=job.device)
        for axis in axes:
            tag = Tag(Purpose.CONTROL, site="operations of a profile")
            job.communicator.all_reduce(sums, axis, tag)
        forward, backward = (scaled(number, "FLOPs") for number in sums.tolist())
        return {f"of all ranks along {'+'.join(axes)}": f"forward {forward}, backward {backward}"}
