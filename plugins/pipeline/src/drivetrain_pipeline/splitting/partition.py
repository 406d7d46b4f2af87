"""The way of a model into this rank's part of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from drivetrain.precision.precision import Precision
from drivetrain_pipeline.cutting import LayerFacts, cut
from drivetrain_pipeline.running.chunked import ATTRIBUTE
from drivetrain_pipeline.splitting.order import Order, order_of
from drivetrain_pipeline.splitting.split import SplitModel

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_pipeline.section import PipelineSection

logger = logging.getLogger("drivetrain.pipeline")


def split_model(
    job: Job, model: nn.Module, section: PipelineSection, placement: Sequence[int]
) -> nn.Module:
    """Keep this rank's chunks of a model of repeated units.

    Args:
        job: tells which stage this is.
        model: the client's.
        section: how to cut.
        placement: stage of each chunk.

    Raises:
        ConfigError: the model cannot be split, and why.
    """
    order = order_of(model, section.place)
    bounds = cut(facts_of(order), len(placement), section.partition, section)
    stage = job.mesh.coordinate("pp")
    own = [chunk for chunk, holder in enumerate(placement) if holder == stage]
    _switch_cache_off(model)
    precision = Precision.of(job.plan)
    dtypes = precision.parameter, precision.buffer or precision.parameter
    split = SplitModel(model, order, bounds, own, placement, job.device, dtypes)
    vars(model)[ATTRIBUTE] = split
    job.on_close(split.restore)
    return model


def facts_of(order: Order) -> list[LayerFacts]:
    """What is known of the units, with the sides that go with each."""
    counts = [_trainable(part.module) for part in order.units]
    for side in order.sides:
        for place in side.positions:
            counts[max(place - 1, 0)] += _trainable(side.module)
    return [
        LayerFacts(part.name, type(part.module).__name__, count)
        for part, count in zip(order.units, counts, strict=True)
    ]


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _switch_cache_off(model: nn.Module) -> None:
    """Let no keys and values of earlier tokens be kept: nobody reads them in training."""
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # type: ignore[union-attr]
        logger.info("pipeline: use_cache of the model's config is switched off")
