"""What the hooks of the plugin do with a job, its model and its engine."""

from __future__ import annotations

import logging
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain_pipeline import ties
from drivetrain_pipeline.module import PipelineModule
from drivetrain_pipeline.planning import schedule_of
from drivetrain_pipeline.running.chunked import ATTRIBUTE
from drivetrain_pipeline.running.runner import PipelineRunner
from drivetrain_pipeline.running.trace import Trace
from drivetrain_pipeline.running.weights_apart import WeightsApart
from drivetrain_pipeline.schedules import warnings_of
from drivetrain_pipeline.splitting.partition import split_model

if TYPE_CHECKING:
    from torch import nn

    from drivetrain.contracts import Runner
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain_pipeline.section import PipelineSection

logger = logging.getLogger("drivetrain.pipeline")


def build(job: Job, model: nn.Module, section: PipelineSection) -> nn.Module:
    """Build the layers of this rank's stage, so that other plugins find them.

    Raises:
        ConfigError: there are fewer layers than stages, or a stage without parameters.
    """
    if isinstance(model, PipelineModule):
        placement = schedule_of(section, section.stages).placement
        model.build(placement, job.mesh.coordinate("pp"), section)
    return model


def partition(job: Job, model: nn.Module, section: PipelineSection) -> nn.Module:
    """Keep this rank's part of a model; all of it, where there is one stage.

    Raises:
        ConfigError: the model cannot be split, and why.
    """
    placement = schedule_of(section, section.stages).placement
    if isinstance(model, PipelineModule):
        build(job, model, section)  # others may have built or replaced layers meanwhile
        vars(model)[ATTRIBUTE] = model
        return model
    return model if section.stages == 1 else split_model(job, model, section, placement)


def describe(job: Job, module: nn.Module) -> None:
    """Fill in which stages have which parameters and buffers of a module that was split."""
    model: Any = getattr(module, ATTRIBUTE, None)
    if model is not None:
        ties.describe(job, module, model.holders, model.own_parts)


def runner(job: Job, engine: Engine, section: PipelineSection) -> Runner | None:
    """The runner of an engine whose module was split."""
    model: Any = getattr(engine.module, ATTRIBUTE, None)
    if model is None:
        return None
    schedules = lru_cache(maxsize=8)(partial(schedule_of, section))
    first = schedules(engine.gradient_accumulation_steps())
    if job.rank == 0:
        for warning in warnings_of(first):
            logger.warning("pipeline: %s", warning)
    trains = engine.optimizer is not None
    tied = ties.tied(engine.module, model.holders)
    return PipelineRunner(
        engine,
        model,
        schedules,
        apart=WeightsApart(engine, tied) if trains and first.splits_backward else None,
        tied=tied,
        dynamic=section.dynamic_shape,
        trace=Trace(job, Path(section.timeline)) if section.timeline is not None else None,
    )
