"""Jobs on the C++ device whose states live in host memory; each function runs on a rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from device_memory import allocated
from drivetrain_offload.host.copies import CopyStream, Mark
from drivetrain_offload.host.side import HostSide
from on_demand import loss_of, start

from drivetrain.contracts import UpdateRule
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError


class LateMark:
    """A point that is only reached when someone waits for it, which is as late as can be."""

    def __init__(self, reach: Callable[[], None]) -> None:
        self._reach: Callable[[], None] | None = reach
        self._lock = threading.Lock()

    def wait(self) -> None:
        self.synchronize()

    def synchronize(self) -> None:
        with self._lock:
            reach, self._reach = self._reach, None
            if reach is not None:
                reach()


class LateStream(CopyStream):
    """Copies that are carried out, in order, when someone waits for them and no earlier."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._last: LateMark | None = None

    def copy(
        self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Iterable[Mark] = ()
    ) -> Mark:
        pairs, before = list(pairs), [mark for mark in (self._last, *after) if mark is not None]

        def reach() -> None:
            for mark in before:
                mark.synchronize()
            for target, source in pairs:
                target.copy_(source)

        self._last = LateMark(reach)
        return self._last


@contextmanager
def late_copies() -> Iterator[None]:
    """Every copy happens at the last moment."""
    with (
        patch("drivetrain_offload.host.side.CopyStream", LateStream),
        patch("drivetrain_offload.parameters.stores.CopyStream", LateStream),
    ):
        yield


def losses_and_weights(
    config: Mapping[str, Any], steps: int, *, late: bool = False
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What a rank sees of a training."""
    if late:
        with late_copies():
            return losses_and_weights(config, steps)
    engine = start(config)
    losses = train(engine, range(steps))
    weights = {name: tensor.cpu() for name, tensor in engine.module_state_dict().items()}
    engine.destroy()
    engine.job.close()
    assert not [t for t in threading.enumerate() if t.name == "drivetrain-offload"]
    return losses, weights


def train(engine: Engine, steps: Iterable[int]) -> list[float]:
    losses = []
    for step in steps:
        for micro in range(engine.gradient_accumulation_steps()):
            loss = loss_of(engine, 10 * step + micro)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def device_bytes(config: Mapping[str, Any]) -> int:
    """Bytes on the device between two steps."""
    engine = start(config)
    train(engine, range(2))
    found = allocated()
    engine.destroy()
    return found


def where_rules_run(config: Mapping[str, Any]) -> set[tuple[str, str, bool]]:
    """Device of the weights, name of the thread, and whether there were gradients enabled."""
    seen = set()
    engine = start(config)
    rule: Any = engine.states._optimizer.rule  # type: ignore[attr-defined]
    kind: type[UpdateRule] = type(rule)
    before = kind.update

    def update(self: UpdateRule, bucket: Any, *arguments: Any) -> None:
        thread = threading.current_thread().name
        seen.add((bucket.weights.device.type, thread, torch.is_grad_enabled()))
        before(self, bucket, *arguments)

    with patch.object(kind, "update", update):
        train(engine, range(2))
        engine.states.flush()
    engine.destroy()
    return seen


def fails_in_the_worker(config: Mapping[str, Any]) -> list[str]:
    """The errors of a step whose rule fails, and of the steps after it."""
    engine = start(config)
    rule: Any = engine.states._optimizer.rule  # type: ignore[attr-defined]
    kind: type[UpdateRule] = type(rule)
    before, found, calls = kind.update, [], [0]

    def update(self: UpdateRule, *arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 1:
            raise ZeroDivisionError("planted")
        before(self, *arguments)

    with patch.object(kind, "update", update):
        for step in range(2):
            try:
                train(engine, [step])
            except ZeroDivisionError as error:
                found.append(f"{type(error).__name__}: {error}")
    engine.destroy()
    engine.job.close()
    return found


def fails_on_rank_1(config: Mapping[str, Any]) -> None:
    """Trains until the rule fails on one rank."""
    engine = start(config)
    rule: Any = engine.states._optimizer.rule  # type: ignore[attr-defined]
    kind: type[UpdateRule] = type(rule)
    before = kind.update

    def update(self: UpdateRule, bucket: Any, *arguments: Any) -> None:
        if engine.job.rank == 1 and bucket.step == 2:
            raise ZeroDivisionError("planted")
        before(self, bucket, *arguments)

    with patch.object(kind, "update", update), engine.job:
        train(engine, range(9))


def after_an_infinite_gradient(config: Mapping[str, Any]) -> tuple[list[str], str]:
    """What is not finite after a step whose gradients are not; the error of the steps after it."""
    engine = start(config)
    train(engine, range(2))
    parameter = next(p for p in engine.module.parameters() if p.requires_grad)
    hook = parameter.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    train(engine, [2])
    hook.remove()
    refused = ""
    try:
        train(engine, [3])
    except TrainingError as error:
        refused = str(error)
    engine.states.flush()
    kept = [f for f in engine.states.fragments() if f.kind != "gradient"]
    wrong = [f"{f.kind} of {f.name}" for f in kept if not bool(torch.isfinite(f.read()).all())]
    engine.destroy()
    engine.job.close()
    return wrong, refused


def pinning(config: Mapping[str, Any], *, fails: bool) -> tuple[int, list[str], list[float]]:
    """Bytes that are locked, warnings, and losses."""
    import logging

    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    def refuse(self: object, tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("cannot lock pages\nwith more lines")

    handler = Handler()
    logging.getLogger("drivetrain.offload").addHandler(handler)
    try:
        with patch("warp_accelerator.Warp.pin_memory", refuse) if fails else late_copies():
            engine = start(config)
            losses = train(engine, range(2))
    finally:
        logging.getLogger("drivetrain.offload").removeHandler(handler)
    section: Any = None  # the side exists already
    locked = HostSide.of(engine.job, section).memory.locked
    engine.destroy()
    return locked, messages, losses


def changed_between_backward_and_step(config: Mapping[str, Any], stages: Iterable[int]) -> None:
    """Gradients that are set, and weights that are changed, are what SGD at rate 1 works on."""
    import drivetrain_zero as zero

    for stage in stages:
        section = {**config["zero_optimization"], "stage": stage}
        engine = start({**config, "zero_optimization": section})
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        before = _masters(trained)
        for step in range(3):
            engine.backward(loss_of(engine, step))
            value = (0.0, 0.5, -0.25)[step]
            for parameter in trained:
                zero.safe_set_full_grad(parameter, torch.full(parameter.shape, value))
            if stage < 3 and "bf16" not in config:
                for parameter in trained:
                    parameter.data.mul_(0.5)  # no version tells of it
                before *= 0.5
            engine.step()
            now = _masters(trained)
            torch.testing.assert_close(now, before - value)
            before = now
        engine.destroy()
        engine.job.close()


def _masters(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    import drivetrain_zero as zero

    found = [zero.safe_get_full_fp32_param(parameter) for parameter in parameters]
    return torch.cat([value.cpu().flatten().clone() for value in found if value is not None])
