"""Lookahead: slow weights that follow those of any optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import BucketView, Hyper, StateSpec, UpdateRule, WrappedRule

if TYPE_CHECKING:
    from drivetrain.contracts import BucketSpec

SLOW = "slow_weights"


class LookaheadRule(WrappedRule):
    """Lookahead (Zhang et al. 2019, https://arxiv.org/abs/1907.08610, algorithm 1).

    The inner rule's own states go on over a sync, as in the paper.

    Args:
        rule: the inner rule.
        steps: inner updates between two syncs (k).
        alpha: how far the slow weights move towards the others.
    """

    def __init__(self, rule: UpdateRule, steps: int, alpha: float) -> None:
        super().__init__(rule)
        self.steps, self.alpha = steps, alpha

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        # Not a number until a cycle has begun with the state in place.
        slow = StateSpec(SLOW, bucket.master_dtype, initial=float("nan"))
        return [*super().states(bucket), slow]

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        weights, slow = bucket.weights, bucket.states[SLOW]
        if (bucket.step - 1) % self.steps == 0:
            slow.copy_(weights)
        super().update(bucket, hyper, scale)
        if bucket.step % self.steps == 0:
            back = torch.where(slow.isnan(), weights, slow)
            weights.lerp_(back, 1 - self.alpha)
            if bucket.out is not None:
                bucket.out.copy_(weights)
