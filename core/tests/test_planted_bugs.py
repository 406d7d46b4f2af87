"""Bugs that such libraries have shipped, planted on purpose: the comparison must catch each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from drivetrain.engine.engine import Engine
from drivetrain.states.all_reduce import AllReduceBucket
from drivetrain.states.gradients import GradientBucket, Slot
from drivetrain.states.replicated import ReplicatedStates
from drivetrain.testing import assert_trains_like_reference, data
from drivetrain.testing.reference import Case

CONFIG: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "data_parallel": {"bucket_bytes": 512, "first_bucket_bytes": 64},
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}


class Reentrant(nn.Module):
    """One layer used inside and outside a re-entrant checkpoint: it accumulates twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.shared(inputs))
        hidden = checkpoint(lambda x: torch.tanh(self.shared(x)), hidden, use_reentrant=True)
        return nn.functional.mse_loss(self.head(hidden), targets)


REENTRANT = Case(Reentrant, data.vectors)


def wrong_divisor() -> AbstractContextManager[Any]:
    return patch.object(Engine, "gradient_divisor", lambda engine: 2)


def missed_accumulation() -> AbstractContextManager[Any]:
    def overwrite(bucket: AllReduceBucket, slot: Slot, gradient: torch.Tensor) -> None:
        bucket.views[slot.index].copy_(gradient)

    return patch.object(AllReduceBucket, "add", overwrite)


def late_gradient_lost() -> AbstractContextManager[Any]:
    return patch.object(AllReduceBucket, "add_late", lambda bucket: None)


def norm_counted_twice() -> AbstractContextManager[Any]:
    once = ReplicatedStates.gradient_norm
    return patch.object(ReplicatedStates, "gradient_norm", lambda states: once(states) * 2**0.5)


def one_bucket_not_reduced() -> AbstractContextManager[Any]:
    sum_up = AllReduceBucket._sum

    def skip_first(bucket: AllReduceBucket, gradient: torch.Tensor) -> None:
        if bucket.key != "g0.b0":
            sum_up(bucket, gradient)

    return patch.object(AllReduceBucket, "_sum", skip_first)


def stale_gradients_kept() -> AbstractContextManager[Any]:
    def forget_to_restart(bucket: GradientBucket) -> None:
        bucket.missing = len(bucket.slots)
        bucket.sent = False
        for slot in bucket.slots:
            slot.seen = False

    return patch.object(GradientBucket, "restart", forget_to_restart)


CLIPPED = {"gradient_clipping": 0.05}  # binds in every step, so it hides a wrong divisor

BUGS: list[tuple[Callable[[], AbstractContextManager[Any]], Case | str, dict[str, Any]]] = [
    (wrong_divisor, "mlp", {}),
    (missed_accumulation, "mlp", {}),
    (late_gradient_lost, REENTRANT, {}),
    (norm_counted_twice, "mlp", CLIPPED),
    (one_bucket_not_reduced, "mlp", {}),
    (stale_gradients_kept, "mlp", {}),
]


@pytest.mark.parametrize(("bug", "model", "keys"), BUGS, ids=[bug.__name__ for bug, *_ in BUGS])
def test_a_planted_bug_is_caught(
    bug: Callable[[], AbstractContextManager[Any]], model: Case | str, keys: dict[str, Any]
) -> None:
    assert_trains_like_reference(CONFIG | keys, 2, model=model, steps=5, inside=ExitStack)
    with pytest.raises(AssertionError, match="relative difference"):
        assert_trains_like_reference(CONFIG | keys, 2, model=model, steps=5, inside=bug)
