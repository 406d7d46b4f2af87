"""What was measured of a model: a row for every module, with all that is inside of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from drivetrain_profiler.counter import OperationCounter
from drivetrain_profiler.formulas import NOTHING, Cost
from drivetrain_profiler.places import ModuleHooks, in_backward


class ModuleTimer:
    """Wall-clock time of every module's forward, waiting for the device before and after it.

    Args:
        wait: waits for the device.

    Attributes:
        seconds: name -> time in all of its forwards; what backward computes again is not in it.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._wait = wait
        self._begun: list[float] = []

    def enter_module(self, _name: str) -> None:
        """A module's forward begins."""
        if not in_backward():
            self._wait()
            self._begun.append(time.perf_counter())

    def leave_module(self, name: str) -> None:
        """A module's forward ends."""
        if not in_backward() and self._begun:
            self._wait()
            spent = time.perf_counter() - self._begun.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


@dataclass
class ModuleFigures:
    """One module with all that is inside of it.

    Args:
        name: its path in the model; empty for the model.
        kind: name of its class.
        depth: modules around it.
        parameters: numbers in its parameters, each counted once.
        forward: operations of its forward passes.
        backward: operations of backward, without what is computed again.
        recompute: operations that backward computed again.
        seconds: time in its forward passes.
        inside: modules in it, from the outside in.
    """

    name: str
    kind: str
    depth: int
    parameters: int = 0
    forward: Cost = NOTHING
    backward: Cost = NOTHING
    recompute: Cost = NOTHING
    seconds: float = 0.0
    inside: list[ModuleFigures] = field(default_factory=list, repr=False)

    @property
    def label(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2] or self.kind

    def walk(self) -> Iterator[ModuleFigures]:
        """This module and all inside, in the model's order."""
        yield self
        for part in self.inside:
            yield from part.walk()


def figures(
    model: nn.Module,
    counter: OperationCounter,
    timer: ModuleTimer,
    ignored: Sequence[type[nn.Module]] = (),
) -> ModuleFigures:
    """Put together what was counted and timed.

    Args:
        model: as it was when hooks were set.
        counter: has counted.
        timer: has taken times.
        ignored: classes of modules whose operations are left out, with all that is inside.
    """

    def made(module: nn.Module, name: str, depth: int, seen: set[int]) -> ModuleFigures:
        kind = type(module).__name__
        found = ModuleFigures(name, kind, depth, seconds=timer.seconds.get(name, 0.0))
        found.parameters = sum(p.numel() for p in module.parameters())
        if not isinstance(module, tuple(ignored)):
            found.forward = counter.total([name], "forward")
            found.backward = counter.total([name], "backward")
            found.recompute = counter.total([name], "recompute")
        for own, child in module.named_children():
            if id(child) in seen:  # a module in several places counts where it is named first
                continue
            seen.add(id(child))
            part = made(child, f"{name}.{own}" if name else own, depth + 1, seen)
            found.inside.append(part)
            if not isinstance(module, tuple(ignored)):
                found.forward = found.forward.plus(part.forward)
                found.backward = found.backward.plus(part.backward)
                found.recompute = found.recompute.plus(part.recompute)
        if not found.seconds:  # containers such as ModuleList have no forward of their own
            found.seconds = sum(part.seconds for part in found.inside)
        return found

    return made(model, "", 0, {id(model)})


def watched(
    model: nn.Module, counter: OperationCounter | None, timer: ModuleTimer | None
) -> ModuleHooks:
    """Hooks that tell a counter and a timer of all modules; remove them when done."""
    watchers = [w for w in (timer, counter) if w is not None]  # the timer is outside

    def enter(name: str) -> None:
        for watcher in watchers:
            watcher.enter_module(name)

    def leave(name: str) -> None:
        for watcher in reversed(watchers):
            watcher.leave_module(name)

    return ModuleHooks(model.named_modules(), enter, leave)
