"""Reads a step's micro-batches on the stages that need them, and compares them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain_pipeline.running.values import signature

if TYPE_CHECKING:
    from drivetrain.job.job import Job

_FAILED = -1


def read_batches(
    job: Job, batches: Iterator[Any] | None, count: int
) -> tuple[list[Any], list[int]]:
    """Read micro-batches and agree with the other stages on their shapes. Collective over ``pp``.

    Args:
        job: whose device they go to.
        batches: yields them; ``None`` on a stage that needs none.
        count: how many.

    Returns:
        The micro-batches, ``None`` for each on a stage without; and a signature of the shapes of
        each, the same on all stages.

    Raises:
        TrainingError: on every stage: the data ended or failed on one, or stages read batches of
            other shapes.
    """
    found: list[Any] = []
    failure: Exception | None = None
    if batches is not None:
        try:
            with job.span("data"):
                read = [_next(batches, index, count) for index in range(count)]
            found = [_to_device(batch, job.device) for batch in read]
        except Exception as error:  # noqa: BLE001 - raised when the other stages know of it
            failure = error
    signatures = [signature(batch) for batch in found] or [0] * count
    if failure is not None:
        signatures = [_FAILED] * count
    told = _gather(job, signatures)
    if failure is not None:
        raise failure
    for stage, of_stage in enumerate(told):
        if _FAILED in of_stage:
            raise TrainingError(
                f"pipeline: stage {stage} could not read its micro-batches; its own error says why"
            )
    return found or [None] * count, [_one(index, told) for index in range(count)]


def _one(index: int, told: list[list[int]]) -> int:
    values = {stage: of[index] for stage, of in enumerate(told) if of[index]}
    first = min(values, default=0)
    other = next((stage for stage in values if values[stage] != values[first]), None)
    if other is not None:
        raise TrainingError(
            f"pipeline: micro-batch {index + 1} of this step has other shapes on stage {other} "
            f"than on stage {first}: all stages have to read the same batches in the same order"
        )
    return next(iter(values.values()), 0)


def _gather(job: Job, values: list[int]) -> list[list[int]]:
    size = job.mesh.size("pp")
    own = torch.tensor(values, dtype=torch.int64, device=job.device)
    told = torch.empty(size * len(values), dtype=torch.int64, device=job.device)
    tag = Tag(Purpose.CONTROL, site="shapes of micro-batches")
    job.communicator.all_gather(told, own, "pp", tag)
    rows: list[list[int]] = told.view(size, -1).tolist()
    return rows


def _next(batches: Iterator[Any], index: int, count: int) -> Any:
    if not isinstance(batches, Iterator):
        raise TrainingError(
            f"a batch is taken from an iterator, which goes on where it was, not from a "
            f"{type(batches).__name__}, which would begin again: make iter(...) of it once"
        )
    try:
        return next(batches)
    except StopIteration:
        raise TrainingError(
            f"the data ended at micro-batch {index + 1} of {count} of a step; wrap the loader in "
            "drivetrain.engine.loader.RepeatingLoader, or stop one step earlier"
        ) from None


def _to_device(batch: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), batch)
