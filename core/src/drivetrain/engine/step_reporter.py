"""Collect what a step did, and log the progress line."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.contracts.loop.step_report import StepReport
from drivetrain.contracts.world.collective import Op, Purpose, Tag
from drivetrain.engine.stepping import loss_axes
from drivetrain.sections.observability import MemoryBreakdown, StepsPerPrint, WallClockBreakdown
from drivetrain.states.gradient_norm import accumulator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan

logger = logging.getLogger("drivetrain.engine")


class StepReporter:
    """Makes one :class:`StepReport` for every accumulation boundary of an engine.

    Args:
        plan: tells how often a step gets a log line, and what stands in it.
    """

    def __init__(self, plan: Plan) -> None:
        self._steps_per_print = plan.section(StepsPerPrint).root or 0
        self._details = {
            "breakdown": plan.section(WallClockBreakdown).root,
            "memory": plan.section(MemoryBreakdown).root,
        }
        self._tokens = 0
        self._ended_at = time.perf_counter()

    def count_tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count a forward's tokens: the elements of its first two-dimensional integer tensor."""
        for value in (*args, *kwargs.values()):
            if (
                isinstance(value, torch.Tensor)
                and value.dim() == 2
                and not value.is_floating_point()
            ):
                self._tokens += value.numel()
                return

    def prints(self, step: int) -> bool:
        """Whether ``step`` gets a log line."""
        return self._steps_per_print > 0 and step % self._steps_per_print == 0

    def take_tokens(self) -> int:
        """Tokens of this data shard since the last call."""
        tokens, self._tokens = self._tokens, 0
        return tokens

    def tokens_of_step(self, job: Job) -> int:
        """Tokens of all data shards since the last call. Collective over stages, which see others.

        The first stage of a pipeline takes them, and the engines of all must count alike.
        """
        tokens = self.take_tokens()
        if job.mesh.size("pp") > 1:
            most = torch.tensor([tokens])  # on the host, so that no device is waited for
            tag = Tag(Purpose.CONTROL, site="tokens of a step")
            job.communicator.all_reduce(most, "pp", tag, op=Op.MAX)
            tokens = int(most)
        return tokens * job.mesh.size("data")

    def mean_loss(
        self,
        engine: Engine,
        total: torch.Tensor | None,
        weight: float | torch.Tensor | None,
        steps: int,
    ) -> tuple[torch.Tensor | None, float | torch.Tensor]:
        """Return the loss of the boundary just passed as a fraction.

        It is the mean that the gradient is of, also where ``gradient_allreduce_op: sum`` adds up
        the gradients of data shards. The mean over ranks needs a collective, so it is taken only
        for steps that are printed or that a plugin looks at; others have this rank's. Where only
        the last of several stages has one, all get it.

        Args:
            engine: whose boundary it is; its step is counted.
            total: this rank's sum of losses; ``None`` if the engine has seen none.
            weight: sum of their weights; ``None`` if they have none.
            steps: micro-batches of the window.

        Returns:
            Numerator and denominator; the denominator is 0 if no loss was given.
        """
        job = engine.job
        staged = job.mesh.size("pp") > 1
        if not staged and not self._is_looked_at(engine):
            return total, steps if weight is None else weight
        found = torch.zeros(3, dtype=accumulator(job.device), device=job.device)
        if total is not None:
            found[0], found[2] = total, 1.0
        if weight is not None:
            found[1] = weight
        tag = Tag(Purpose.CONTROL, site="loss of a step")
        job.communicator.all_reduce(found, loss_axes(job), tag)
        total, weights, given = found.unbind()
        # A stage that has extra terms only has no weights, whatever the last one has.
        unweighted = (given > 0) * float(steps * job.mesh.size("data"))
        return total, torch.where(weights > 0, weights, unweighted)

    def _is_looked_at(self, engine: Engine) -> bool:
        return self.prints(engine.global_steps) or engine.job.hub.has("step_end")

    def report(
        self,
        engine: Engine,
        *,
        rates: Sequence[float],
        samples: int,
        tokens: int,
        loss: tuple[torch.Tensor | None, float | torch.Tensor],
        norm: torch.Tensor | None,
    ) -> StepReport:
        """Report the boundary that ``engine`` has just passed, with its :meth:`mean_loss`."""
        job, now = engine.job, time.perf_counter()
        axis = loss_axes(job) if self._is_looked_at(engine) else None
        collected = job.values.take(job.communicator, axis, job.device)
        report = StepReport(
            step=engine.global_steps,
            applied=engine.was_step_applied(),
            samples=engine.global_samples,
            step_samples=samples,
            step_tokens=tokens,
            learning_rates=tuple(rates),
            loss_scale=engine.loss_scaler.scale_value,
            seconds=now - self._ended_at,
            times=job.ledger.take(),
            memory=lambda: (
                job.accelerator.memory_allocated(),
                job.accelerator.max_memory_allocated(),
            ),
            loss_sum=loss[0],
            loss_count=loss[1],
            norm=norm,
            collected=collected,
        )
        self._ended_at = now
        if job.rank == 0 and self.prints(engine.global_steps):
            logger.info(report.line(**self._details))
        return report
