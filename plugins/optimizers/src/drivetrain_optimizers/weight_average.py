"""An exponential moving average of the weights, under any optimizer and wherever states live."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import (
    BucketView,
    Hyper,
    Op,
    Purpose,
    StateSpec,
    Tag,
    UpdateRule,
    WrappedRule,
)
from drivetrain.errors import TrainingError
from drivetrain.optimization.spans import span_size

if TYPE_CHECKING:
    from torch import nn

    from drivetrain.contracts import BucketSpec, Fragment, ParameterInfo
    from drivetrain.engine.engine import Engine

AVERAGE = "weight_average"


class AveragingRule(WrappedRule):
    """Another rule, and an average of the weights that it leaves.

    As in ``torch.optim.swa_utils``, the average begins with the weights after the first update.

    Args:
        rule: the inner rule.
        decay: the share of the average that an update keeps.
    """

    def __init__(self, rule: UpdateRule, decay: float) -> None:
        super().__init__(rule)
        self.decay = decay

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        # At least fp32: steps of a thousandth are lost in fewer bits. No number: nothing seen yet.
        dtype = torch.promote_types(bucket.master_dtype, torch.float32)
        return [*super().states(bucket), StateSpec(AVERAGE, dtype, initial=float("nan"))]

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        super().update(bucket, hyper, scale)
        whole, size = bucket.states[AVERAGE], span_size(bucket.weights.device)
        pieces = zip(torch.split(whole, size), torch.split(bucket.weights, size), strict=True)
        for average, stored in pieces:
            weights = stored.to(average.dtype)
            first = average.isnan()
            average.lerp_(weights, 1 - self.decay).copy_(torch.where(first, weights, average))


@contextmanager
def averaged_weights(engine: Engine) -> Iterator[None]:
    """Compute with averaged weights inside the block, for evaluation or export. Collective.

    Parameters without an average, such as frozen ones, stay as they are. Afterwards all parameters
    have their own values again. Neither masters nor optimizer states are touched, so do not train
    inside the block.

    Raises:
        TrainingError: the config has no section ``weight_average``.
    """
    states = engine.states
    states.flush()
    fragments = [f for f in states.fragments() if f.kind in ("parameter", AVERAGE)]
    held = any(f.kind == AVERAGE for f in fragments)
    vote = torch.tensor([held], dtype=torch.int32)
    engine.job.communicator.all_reduce(vote, "world", Tag(Purpose.CONTROL, site=AVERAGE))
    if not vote:
        raise TrainingError("there is no average: add the section weight_average to the config")
    own = [(f, f.read().clone()) for f in fragments if f.kind == "parameter"]
    with torch.no_grad():
        for parameter in engine.module.parameters():
            _show_average(engine, parameter, fragments)
        states.fragments_written()
    try:
        yield
        # Ranks of one host read each other's shards in place: none may change before all have.
        engine.job.communicator.barrier("world", Tag(Purpose.CONTROL, site=AVERAGE))
    finally:
        with torch.no_grad():
            for fragment, values in own:
                fragment.write(values)
            states.fragments_written()


def _show_average(engine: Engine, parameter: nn.Parameter, fragments: Sequence[Fragment]) -> None:
    """Put one parameter's average together from all ranks, and write what this rank shows of it."""
    info: ParameterInfo = engine.job.parameters.info(parameter)
    if not parameter.requires_grad:
        return
    dtype = torch.promote_types(info.master_dtype or info.compute_dtype, torch.float32)
    mine = [f for f in fragments if f.name == info.name]
    # Ranks keep different parts or copies of one; whoever has a number has the largest.
    whole = torch.full(info.whole_shape, -torch.inf, dtype=dtype, device=engine.device)
    for fragment in mine:
        if fragment.kind == AVERAGE:
            flat = fragment.read().to(whole)
            flat = torch.where(flat.isnan(), -torch.inf, flat)
            for box in fragment.boxes:
                box.of(whole).copy_(box.of_storage(flat))
    tag = Tag(Purpose.STATE, info.name, AVERAGE)
    engine.job.communicator.all_reduce(whole, info.reduction, tag, op=Op.MAX)
    for fragment in mine:
        if fragment.kind == "parameter":
            flat = fragment.read().clone()
            for box in fragment.boxes:
                target, average = box.of_storage(flat), box.of(whole)
                target.copy_(torch.where(average.isinf(), target, average.to(target)))
            fragment.write(flat)
