"""What the optimizers that send one bit per element share: errors, own gradients, averages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import (
    BucketView,
    Communicator,
    Hyper,
    Purpose,
    StateSpec,
    Tag,
    UpdateRule,
)
from drivetrain.errors import ConfigError
from drivetrain.optimization.checks import check_betas, check_non_negative
from drivetrain_onebit.compression import average_, chunk_size

if TYPE_CHECKING:
    from torch import nn

    from drivetrain.contracts import BucketSpec, ParameterInfo


class OneBitRule(UpdateRule):
    """A rule that averages by signs once its warm-up is over; a base class.

    What compressions have left out is kept on each rank: ``worker_error`` for the whole bucket,
    ``server_error`` for the chunk that this rank is the server of. Both are saved for each rank,
    and start from zero where the number of ranks or the buckets change, which loading says.

    Args:
        communicator: carries the signs; over the axes that a bucket's gradients are summed over.
        lr: learning rate.
        betas: decay of both moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        steps: further counts of steps by name, which must be whole numbers from 0 on.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        communicator: Communicator,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        **steps: float,
    ) -> None:
        check_non_negative(lr=lr, eps=eps, weight_decay=weight_decay, **steps)
        check_betas(betas)
        for name, value in steps.items():
            if value != int(value):
                raise ValueError(f"{name} must be a whole number, got {value}")
        self.defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
        }
        self.communicator = communicator

    def rule_for(self, parameter: nn.Parameter, info: ParameterInfo) -> UpdateRule:
        if info.sparse:
            raise ConfigError(
                f"optimizer.type: {type(self).__name__} averages momenta of all elements, but the "
                f"gradient of parameter {info.name} is sparse: leave out sparse_gradients, or use "
                "another optimizer"
            )
        return self

    def errors(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        """The states of what compressions leave out; none on one rank."""
        workers = self.communicator.size(bucket.reduction)
        if workers == 1:
            return ()
        chunk = chunk_size(bucket.numel, workers)
        return (
            StateSpec("worker_error", torch.float32, numel=bucket.numel),
            StateSpec("server_error", torch.float32, numel=chunk),
        )

    def own_gradient(
        self, bucket: BucketView, scale: float | torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """This rank's gradient [n] of the mean loss.

        The scaled gradient is this rank's term of the sum, which is the mean of all ranks.
        """
        return bucket.gradient.to(dtype) * scale * self.communicator.size(bucket.reduction)

    def average(self, tensor: torch.Tensor, bucket: BucketView, what: str) -> None:
        """Replace ``tensor`` [n] by about its mean over ranks; nothing to do on one rank."""
        if self.communicator.size(bucket.reduction) > 1:
            tag = Tag(Purpose.STATE, bucket.key, f"1-bit {what}")
            errors = bucket.states["worker_error"], bucket.states["server_error"]
            average_(tensor, *errors, self.communicator, bucket.reduction, tag)

    def forget_errors(self, bucket: BucketView) -> None:
        """Start again from no error."""
        for name in ("worker_error", "server_error"):
            if name in bucket.states:
                bucket.states[name].zero_()


def stays_zero(bucket: BucketView, hyper: Hyper) -> torch.Tensor:
    """Where momenta are kept at 0, bool [n]: where the second moment or ``exp_avg_mask`` is 0.

    Averaged signs are never 0, so an element that has had no gradient so far would otherwise be
    changed by a sign divided by nearly nothing.
    """
    still = bucket.states["exp_avg_sq"] == 0
    mask: torch.Tensor | None = hyper.get("exp_avg_mask")
    if mask is not None:
        for segment in bucket.segments:
            segment.of(still).logical_or_(mask.to(still.device) == 0)
    return still
