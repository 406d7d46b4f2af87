"""What scripts of DeepSpeed's pipelines call on an engine, and ours beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from drivetrain.engine.engine import Engine
from drivetrain.engine.loader import endless_batches
from drivetrain.engine.micro_batches import mean_over_ranks
from drivetrain.errors import TrainingError
from drivetrain_pipeline.running.runner import PipelineRunner


class Evaluation(NamedTuple):
    """What :func:`evaluate` has found.

    Args:
        loss: mean over micro-batches and data shards, 0-d, the same on every rank.
        outputs: what the model returned for each micro-batch, on the stage that has its end; of a
            :class:`~drivetrain_pipeline.module.PipelineModule` a dict of ``loss`` and ``logits``.
            Empty elsewhere.
    """

    loss: torch.Tensor
    outputs: Sequence[Any]


def evaluate(
    engine: Engine,
    batches: Iterator[Any],
    micro_batches: int | None = None,
    *,
    return_outputs: bool = False,
) -> Evaluation:
    """Run micro-batches forward through the pipeline, without gradients. Collective.

    Args:
        engine: of a model that was split.
        batches: yields micro-batches of this data shard.
        micro_batches: how many of them; by default as many as a step has.
        return_outputs: keep what the model returns.

    Raises:
        TrainingError: the engine has no pipeline, or the data ends.
    """
    runner = _runner(engine)
    count = engine.gradient_accumulation_steps() if micro_batches is None else micro_batches
    was_training = engine.training
    engine.eval()
    try:
        with torch.no_grad():
            total, outputs = runner.evaluate(batches, count, keep=return_outputs)
            return Evaluation(mean_over_ranks(engine.job, total), outputs)
    finally:
        engine.train(was_training)


def _is_pipe_parallel(engine: Engine) -> bool:
    """Whether the model is split over several stages."""
    return engine.job.mesh.size("pp") > 1


is_pipe_parallel = property(_is_pipe_parallel)
"""Of an engine, as scripts read it: ``engine.is_pipe_parallel``."""


def is_first_stage(engine: Engine) -> bool:
    """Whether this rank has the beginning of the model."""
    return _holder(engine, 0) == engine.job.mesh.coordinate("pp")


def is_last_stage(engine: Engine) -> bool:
    """Whether this rank has the end of the model, and so the loss."""
    return _holder(engine, -1) == engine.job.mesh.coordinate("pp")


def set_dataiterator(engine: Engine, iterator: Iterator[Any]) -> None:
    """Have ``engine.train_batch()`` take micro-batches from ``iterator``."""
    _runner(engine)
    engine._batches = iterator


def set_dataloader(engine: Engine, loader: Iterable[Any]) -> None:
    """Have ``engine.train_batch()`` take micro-batches from ``loader``, restarted when it ends."""
    set_dataiterator(engine, endless_batches(loader))


def set_batch_fn(engine: Engine, function: Callable[[Any], Any]) -> None:
    """Have ``function`` change each micro-batch that is read."""
    _runner(engine).batch_fn = function


def reset_activation_shape(engine: Engine) -> None:
    """Do nothing: shapes that change are noticed."""
    _runner(engine)


def set_has_attention_mask(engine: Engine, value: bool) -> None:
    """Do nothing: tensors of any dtype travel between stages."""
    _runner(engine)


def _holder(engine: Engine, chunk: int) -> int:
    return _runner(engine).placement[chunk]


def _runner(engine: Engine) -> PipelineRunner:
    if not isinstance(engine.runner, PipelineRunner):
        raise TrainingError(
            "this engine has no pipeline: give it a PipelineModule, or a config with "
            "pipeline.stages above 1"
        )
    return engine.runner


class _HasPipeline(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Engine) and isinstance(instance.runner, PipelineRunner)


class PipelineEngine(metaclass=_HasPipeline):
    """For ``isinstance(engine, PipelineEngine)``: engines whose model runs as a pipeline."""
