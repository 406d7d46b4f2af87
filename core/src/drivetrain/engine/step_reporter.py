"""Collect what a step did, and log the progress line."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.contracts.loop.step_report import StepReport
from drivetrain.contracts.world.collective import Purpose, Tag
from drivetrain.sections.observability import MemoryBreakdown, StepsPerPrint, WallClockBreakdown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain.engine.engine import Engine
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

    def report(
        self,
        engine: Engine,
        *,
        rates: Sequence[float],
        samples: int,
        tokens: int,
        loss: tuple[torch.Tensor | None, int],
        norm: torch.Tensor | None,
    ) -> StepReport:
        """Report the boundary that ``engine`` has just passed.

        The mean loss over data shards needs a collective, so it is taken only for steps that
        somebody looks at; other reports show this rank's.
        """
        loss_sum, loss_count = loss
        job = engine.job
        printed = self.prints(engine.global_steps)
        if loss_sum is not None and (printed or job.hub.has("step_end")):
            tag = Tag(Purpose.CONTROL, site="loss of a step")
            job.communicator.all_reduce(loss_sum, "data", tag)
            loss_count *= job.mesh.size("data")
        now = time.perf_counter()
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
            loss_sum=loss_sum,
            loss_count=loss_count,
            norm=norm,
        )
        self._ended_at = now
        if printed and job.rank == 0:
            logger.info(report.line(**self._details))
        return report
