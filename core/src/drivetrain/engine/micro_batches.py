"""The loop over the micro-batches of one global batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from drivetrain.contracts.world.collective import Purpose, Tag
from drivetrain.engine.stepping import checked_weight, loss_axes
from drivetrain.errors import TrainingError
from drivetrain.precision.loss_watch import weighted_loss
from drivetrain.states.gradient_norm import accumulator

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job


class MicroBatchRunner:
    """The plain loop: forward, backward, step for every micro-batch.

    A micro-batch is what the module takes: a mapping becomes keywords, a sequence becomes
    positional arguments, anything else the only argument. The module returns its loss, or a tuple
    that begins with it, or an object or mapping with ``loss``. The latter may have a
    ``loss_weight``, too: the number of tokens or samples that the loss is a mean of, where that
    differs; see ``engine.backward``.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, batches: Iterator[Any], train: bool) -> torch.Tensor:
        engine = self._engine
        if not isinstance(batches, Iterator):
            raise TrainingError(
                f"a batch is taken from an iterator, which goes on where it was, not from a "
                f"{type(batches).__name__}, which would begin again: make iter(...) of it once"
            )
        count = engine.gradient_accumulation_steps() if train else 1
        # The sum of losses and that of their weights; in float64 where the loss is.
        total = torch.zeros(2, dtype=torch.float32, device=engine.device)
        for index in range(count):
            output = _call(engine, _next(engine.job, batches, index, count))
            loss, weight = loss_of(output), checked_weight(_part(output, "loss_weight"))
            if train:
                engine.backward(loss, weight=weight)
                engine.step()
            value, weight = loss.detach().reshape(()), 1.0 if weight is None else weight
            counted = torch.zeros_like(total[1]) + weight
            total = total + torch.stack([weighted_loss(value, weight), counted])
        return total


def mean_over_ranks(job: Job, total: torch.Tensor) -> torch.Tensor:
    """The mean loss of a batch, 0-d, of what a runner has returned on each rank. Collective."""
    total = total.to(accumulator(job.device))  # stages without a loss do not know its dtype
    tag = Tag(Purpose.CONTROL, site="mean loss of a batch")
    job.communicator.all_reduce(total, loss_axes(job), tag)
    return total[0] / total[1]


def _next(job: Job, batches: Iterator[Any], index: int, count: int) -> Any:
    try:
        with job.span("data"):
            return next(batches)
    except StopIteration:
        raise TrainingError(
            f"the data ended at micro-batch {index + 1} of {count} of a step; wrap the loader in "
            "drivetrain.engine.loader.RepeatingLoader, or stop one step earlier"
        ) from None


def _call(engine: Engine, batch: Any) -> Any:
    def move(leaf: Any) -> Any:
        return leaf.to(engine.device) if isinstance(leaf, torch.Tensor) else leaf

    batch = pytree.tree_map(move, batch)
    if isinstance(batch, Mapping):
        return engine(**batch)
    if isinstance(batch, (tuple, list)):
        return engine(*batch)
    return engine(batch)


def loss_of(output: Any) -> torch.Tensor:
    """The loss in a module's output.

    Raises:
        TrainingError: there is none.
    """
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, (tuple, list)) and output:
        return _tensor(output[0])
    return _tensor(_part(output, "loss"))


def _part(output: Any, name: str) -> Any:
    """What a module's output has under ``name``, or ``None``."""
    if isinstance(output, Mapping):
        return output.get(name)
    return None if isinstance(output, torch.Tensor) else getattr(output, name, None)


def _tensor(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor):
        raise TrainingError(
            "train_batch needs a module that answers its loss, a tuple that begins with it, or an "
            f"object with .loss; the loss found is {type(loss).__name__}"
        )
    return loss
