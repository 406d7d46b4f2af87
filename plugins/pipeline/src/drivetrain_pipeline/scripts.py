"""What scripts of DeepSpeed's pipelines call on an engine, and ours beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from drivetrain.contracts import Purpose, Tag
from drivetrain.engine.engine import Engine
from drivetrain.engine.loader import endless_batches
from drivetrain.engine.micro_batches import loss_of, mean_over_ranks
from drivetrain.errors import TrainingError
from drivetrain.states.gradient_norm import accumulator
from drivetrain_pipeline.running.runner import PipelineRunner

_TAG = Tag(Purpose.CONTROL, site="evaluation")


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


def eval_micro_batches(
    engine: Engine,
    data_iter: Iterator[Any],
    return_logits: bool = False,
    compute_loss: bool = True,
    reduce_output: str | None = "avg",
    bcast_loss: bool = True,
    num_micro_batches: int | None = None,
) -> Any:
    """Do what ``eval_batch`` of DeepSpeed's pipelines does, with its arguments. Collective.

    Args:
        engine: of a model that was split.
        data_iter: yields micro-batches of this data shard.
        return_logits: return outputs, too.
        compute_loss: have the model compute its loss; else its outputs are what is reduced, and
            micro-batches need no labels.
        reduce_output: ``"avg"`` for means over micro-batches and data shards; ``None`` for a list,
            one for each micro-batch of this data shard.
        bcast_loss: all stages get losses; else ``None`` comes on those without the end.
        num_micro_batches: how many; by default as many as a step has.

    Returns:
        The loss or, without one, outputs, which the stage with the end of the model has alone. With
        ``return_logits`` that and the outputs: those of the one micro-batch, a list if there are
        several, ``None`` on other stages.

    Raises:
        TrainingError: the engine has no pipeline, the data ends, or the reduction is not known.
    """
    runner = _runner(engine)
    if reduce_output is not None and reduce_output.lower() != "avg":
        raise TrainingError(f"eval_batch: reduce_output is {reduce_output!r}, expected avg or None")
    count = engine.gradient_accumulation_steps() if num_micro_batches is None else num_micro_batches
    if count < 1:
        raise TrainingError(f"eval_batch: num_micro_batches is {count}, expected 1 or more")
    was_training = engine.training
    engine.eval()
    try:
        with torch.no_grad():
            keeps = return_logits or not compute_loss or reduce_output is None
            total, outputs = runner.evaluate(data_iter, count, keep=keeps, with_loss=compute_loss)
            found = _reduced(engine, total, outputs, compute_loss, reduce_output)
            if compute_loss and reduce_output is None and bcast_loss:
                found = _told(engine, outputs, count)
    finally:
        engine.train(was_training)
    has_end = is_last_stage(engine)
    if compute_loss and not bcast_loss and not has_end:
        found = None
    if not return_logits:
        return found
    logits = [_logits(output) for output in outputs] if has_end else None
    return found, logits[0] if logits is not None and count == 1 else logits


def _reduced(
    engine: Engine, total: torch.Tensor, outputs: list[Any], with_loss: bool, reduce: str | None
) -> Any:
    """What ``eval_batch`` returns first, before stages without it are told."""
    if with_loss and reduce is not None:
        return mean_over_ranks(engine.job, total)
    if not is_last_stage(engine):
        return None
    if with_loss:
        return [loss_of(output) for output in outputs]
    if reduce is None:
        return outputs
    return pytree.tree_map(lambda *each: _mean(engine, each), *outputs)


def _mean(engine: Engine, values: Sequence[Any]) -> Any:
    """Mean over micro-batches and data shards of one tensor of outputs. Collective over ``dp``."""
    if not isinstance(values[0], torch.Tensor) or not values[0].is_floating_point():
        return values[-1]
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    mean = torch.stack([value.to(dtype) for value in values]).mean(0)
    engine.job.communicator.all_reduce(mean, "dp", _TAG)
    return mean / engine.job.mesh.size("dp")


def _told(engine: Engine, outputs: list[Any], count: int) -> list[torch.Tensor]:
    """The losses of all micro-batches, from the stage that has them. Collective over ``pp``."""
    # Stages without a loss do not know its dtype.
    losses = torch.zeros(count, dtype=accumulator(engine.job.device), device=engine.device)
    if is_last_stage(engine):
        losses.copy_(torch.stack([loss_of(output).reshape(()) for output in outputs]))
    engine.job.communicator.broadcast(losses, "pp", _TAG, source=_holder(engine, -1))
    return list(losses.unbind())


def _logits(output: Any) -> Any:
    """What a model returned beside its loss."""
    if isinstance(output, Mapping):
        return output.get("logits", output)
    if isinstance(output, (tuple, list)) and len(output) > 1:
        return output[1]
    return getattr(output, "logits", output)


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
    set_dataiterator(engine, endless_batches(loader, engine))


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
