"""One job whose first steps are compared: records a window, runs the shadows, gives a verdict."""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import nn

from drivetrain import whole
from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.sections.optimization import GradientAllreduceOp
from drivetrain_verify.recording import MicroBatch, Recorder, gathered
from drivetrain_verify.shadow import Shadow, shadows
from drivetrain_verify.states import Values, whole_gradients, whole_weights
from drivetrain_verify.verdict import (
    Finding,
    Verdict,
    compare_gradients,
    compare_outputs,
    compare_weights,
    wrong_uses,
)

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain_verify.section import VerifySection

logger = logging.getLogger("drivetrain.verify")

_LINEAR = ("sgd", "asgd")
"""Optimizers whose updates are linear in the gradient."""


class Work:
    """Compares the engine that trains in one job.

    Args:
        job: the job.
        section: how many steps, and how strictly.
    """

    def __init__(self, job: Job, section: VerifySection) -> None:
        self.verdict = Verdict()
        self._job = job
        self._section = section
        self._recorder = Recorder(job.device)
        self._client: nn.Module | None = None
        self._shadows: tuple[Shadow, Shadow] | None = None
        self._shapes: dict[str, torch.Size] = {}
        self._begun = False
        self._window: tuple[list[list[MicroBatch]], Values | None, float] | None = None
        self._settings: tuple[list[dict[str, Any]], float] | None = None

    @classmethod
    def of(cls, job: Job, section: VerifySection) -> Work:
        """The work of a job."""
        if job not in _works:
            _works[job] = cls(job, section)
        return _works[job]

    @property
    def runs(self) -> bool:
        """Whether steps are still compared."""
        return self._client is not None and self.verdict.steps < self._section.steps

    # -- set-up -------------------------------------------------------------------------------

    def copy_client(self, module: nn.Module) -> None:
        """Keep the module as the client gave it.

        Raises:
            ConfigError: a second engine trains in the job, or the module has no values yet.
        """
        if self._client is not None:
            raise ConfigError("verify: one engine of a job is compared; another one trains in it")
        for name, tensor in module.named_parameters():
            if tensor.is_meta:
                raise ConfigError(
                    f"verify: parameter {name} is on the meta device, so there is nothing to copy: "
                    "build the model with its values, on a host"
                )
        with whole(module):
            self._client = copy.deepcopy(module)

    def follow(self, module: nn.Module) -> nn.Module:
        """Record what the finished module does."""
        return self._recorder.follow(module)

    # -- a window -----------------------------------------------------------------------------

    def begin_window(self, engine: Engine) -> None:
        """Before the first forward of a window. Collective."""
        if self._begun:
            return
        self._begun = True
        groups = _groups(engine)
        if not self._shapes:
            info = self._job.parameters.info
            trained = {name for group in groups for name in group["names"]}
            named = ((info(p), p) for p in engine.module.parameters())
            self._shapes = {
                i.name: torch.Size(i.whole_shape) for i, _ in named if i.name in trained
            }
        weights = whole_weights(engine, self._shapes)

        def name_of(parameter: nn.Parameter) -> str:
            return self._job.parameters.info(parameter).name

        # In the dtype that modules compute in, as each rank keeps them through the window.
        used = {
            name: weights[name].to(p.dtype)
            for p in engine.module.parameters()
            if (name := name_of(p)) in weights
        }
        self._recorder.expect(used, name_of)
        if self._job.rank == 0:
            if self._shadows is None:
                assert self._client is not None
                client = self._client.to(self._job.device)
                self._shadows = shadows(engine, client, list(self._shapes), groups)
            for shadow in self._shadows:
                shadow.begin(weights)

    def end_window(self, engine: Engine) -> None:
        """After the last backward of a window, before its update. Collective."""
        ranks = gathered(self._job, self._recorder.take())
        averages = self._job.plan.section(GradientAllreduceOp).root == "mean"
        divisor: float = (engine.progress.in_window + 1) * (
            self._job.mesh.size("dp") if averages else 1
        )
        actual = whole_gradients(engine, self._shapes)
        if engine.states.weighted:  # weights are the script's; their sum cannot be known here
            divisor = float(engine.gradient_divisor())
        self._settings = _groups(engine), engine.gradient_clipping()
        self._window = ranks, actual, divisor * engine.loss_scaler.scale_value

    def end_step(self, engine: Engine, applied: bool) -> None:
        """After an update. Collective.

        Raises:
            TrainingError: a parameter is off by more than rounding; on every rank.
        """
        window, self._window, self._begun = self._window, None, False
        if window is None or not applied:
            return
        after = whole_weights(engine, self._shapes)
        self.verdict.steps += 1
        found = self._compare(engine, window, after) if self._job.rank == 0 else ""
        text = _told(self._job, found)
        if text:
            self._recorder.stop()
            self._write()
            raise TrainingError(f"verify: {text}")
        if not self.runs:
            self._finish(engine)

    def _compare(
        self,
        engine: Engine,
        window: tuple[list[list[MicroBatch]], Values | None, float],
        after: Values,
    ) -> str:
        """Compare one step; what is to be said of the first parameter that is wrong, if any."""
        assert self._shadows is not None
        assert self._settings is not None
        (exact, plain), (ranks, actual, divisor) = self._shadows, window
        groups, limit = self._settings
        step, factor = engine.global_steps, self._section.factor
        chance = exact.chance(ranks, divisor) if self.verdict.steps == 1 else ""
        if chance:
            return chance
        used = next(wrong_uses(step, ranks), None)
        if used is not None:
            self.verdict.add(used)
            return str(used)
        gradients = exact.gradients(ranks, divisor), plain.gradients(ranks, divisor)
        made = engine.precision.lower or engine.precision.parameter or torch.float32
        findings: list[Finding] = []
        if actual is not None:
            mean = {name: value / divisor for name, value in actual.items()}
            eps = torch.finfo(made).eps
            findings += compare_gradients(step, mean, *gradients, factor, eps)
        if exact.steps_too and not any(found.is_wrong for found in findings):
            weights = (
                exact.step(gradients[0], groups, limit),
                plain.step(gradients[1], groups, limit),
            )
            findings += compare_weights(
                step,
                after,
                *weights,
                gradients,
                _rates(engine, groups),
                factor,
                torch.finfo(torch.float32).eps,
            )
        for found in findings:
            self.verdict.add(found)
        wrong = next((found for found in findings if found.is_wrong), None)
        if wrong is None:
            outputs = exact.outputs, plain.outputs
            wrong = next(compare_outputs(step, ranks, *outputs, factor), None)
        return "" if wrong is None else str(wrong)

    # -- the end ------------------------------------------------------------------------------

    def _finish(self, engine: Engine) -> None:
        self._recorder.stop()
        self._shadows = None
        self._write()
        if self._job.rank == 0:
            for line in self.verdict.lines():
                logger.warning("verify: %s", line)
        if self._section.stop:
            _leave(engine)

    def _write(self) -> None:
        if self._section.report is not None and self._job.rank == 0:
            Path(self._section.report).write_text(
                json.dumps(self.verdict.data(), indent=1), "utf-8"
            )


def _leave(engine: Engine) -> NoReturn:
    """End the process with success, on every rank.

    At once: what the script has under way would be torn down in the order of a traceback, with
    threads of communication that still run.
    """
    job = engine.job
    job.communicator.barrier("world", Tag(Purpose.CONTROL, site="end of the comparison"))
    engine.destroy()
    job.close()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _groups(engine: Engine) -> list[dict[str, Any]]:
    assert engine.optimizer is not None
    info = engine.job.parameters.info
    return [
        {
            "names": [info(parameter).name for parameter in group["params"]],
            "hyper": {key: value for key, value in group.items() if key != "params"},
        }
        for group in engine.optimizer.param_groups
    ]


def _rates(engine: Engine, groups: list[dict[str, Any]]) -> Mapping[str, float]:
    """Learning rates of parameters whose updates do not shrink with their gradients."""
    assert engine.optimizer is not None
    linear = engine.optimizer.type_name.lower() in _LINEAR
    return {
        name: 0.0 if linear else float(group["hyper"]["lr"])
        for group in groups
        for name in group["names"]
    }


def _told(job: Job, text: str) -> str:
    """What rank 0 says. Collective."""
    tag = Tag(Purpose.CONTROL, site="verdict")
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=job.device)
    length = torch.tensor([data.numel()], dtype=torch.int64, device=job.device)
    job.communicator.broadcast(length, "world", tag)
    if not int(length):
        return ""
    if job.rank:
        data = torch.zeros(int(length), dtype=torch.uint8, device=job.device)
    job.communicator.broadcast(data, "world", tag)
    return bytes(data.tolist()).decode()


_works: WeakKeyDictionary[Job, Work] = WeakKeyDictionary()
