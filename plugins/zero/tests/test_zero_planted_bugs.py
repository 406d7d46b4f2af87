"""Bugs that sharding libraries have shipped, planted on purpose: the comparison catches each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from drivetrain_zero.gathering.unit import GatheredUnit
from drivetrain_zero.gathering.unit_hooks import UnitHooks
from drivetrain_zero.shards.gradients import GradientMemory, ReduceScatterBucket
from drivetrain_zero.shards.layout import Layout
from drivetrain_zero.shards.packing import Packing
from drivetrain_zero.shards.whole import AlwaysWhole, GatheredWhole
from drivetrain_zero.states import ZeroStates
from zero_harness import SGD, Run, config, plain, sgd, train
from zero_models import BODY, REENTRANT, ROUTED, UNEVEN

from drivetrain.engine.engine import Engine
from drivetrain.states.gradients import Slot
from drivetrain.testing import RanksFailedError, run_distributed
from drivetrain.testing.reference import Case

Bug = Callable[[], AbstractContextManager[Any]]


def wrong_divisor() -> AbstractContextManager[Any]:
    return patch.object(Engine, "gradient_divisor", lambda engine: 2)


def missed_accumulation() -> AbstractContextManager[Any]:
    """The last micro-batch replaces the sum of the earlier ones."""
    keep = ReduceScatterBucket._keep_sum

    def replace(bucket: ReduceScatterBucket, result: torch.Tensor) -> None:
        bucket._has_sum = False
        keep(bucket, result)

    return patch.object(ReduceScatterBucket, "_keep_sum", replace)


def overwritten_accumulation() -> AbstractContextManager[Any]:
    """The same where whole gradients are kept up to the boundary."""
    add = ReduceScatterBucket.add

    def overwrite(bucket: ReduceScatterBucket, slot: Slot, gradient: torch.Tensor) -> None:
        slot.filled = False
        add(bucket, slot, gradient)

    return patch.object(ReduceScatterBucket, "add", overwrite)


def one_buffer_for_all_buckets() -> AbstractContextManager[Any]:
    """A bucket is filled while the one before it still travels in the same memory."""
    buffers: dict[Any, torch.Tensor] = {}

    def borrow(
        memory: GradientMemory, numel: int, dtype: torch.dtype, axis: Any, device: torch.device
    ) -> torch.Tensor:
        kind = (id(memory), dtype, axis)
        if kind not in buffers or buffers[kind].numel() < numel:
            buffers[kind] = torch.zeros(10**5, dtype=dtype)
        return buffers[kind][:numel]

    stack = ExitStack()
    stack.enter_context(patch.object(GradientMemory, "borrow", borrow))
    stack.enter_context(patch.object(GradientMemory, "give_back", lambda *_: None))
    return stack


def late_gradient_lost() -> AbstractContextManager[Any]:
    return patch.object(ReduceScatterBucket, "add_late", lambda bucket: None)


def late_gradient_of_a_round_lost() -> AbstractContextManager[Any]:
    """Where each backward is reduced, what is late in one takes part in the next."""
    begin = ReduceScatterBucket.begin_round

    def forget(bucket: ReduceScatterBucket) -> None:
        for slot in bucket.slots:
            slot.late = None
        begin(bucket)

    return patch.object(ReduceScatterBucket, "begin_round", forget)


def norm_counted_twice() -> AbstractContextManager[Any]:
    """Every copy of a shard counts."""
    once = ZeroStates.gradient_norm

    def twice(states: ZeroStates) -> torch.Tensor:
        for bucket in states._sums:
            bucket.parameters.counts = True
        return once(states)

    return patch.object(ZeroStates, "gradient_norm", twice)


def norm_of_own_shard() -> AbstractContextManager[Any]:
    def own(states: ZeroStates) -> torch.Tensor:
        norms = [torch.linalg.vector_norm(bucket.shard) for bucket in states._sums]
        return torch.linalg.vector_norm(torch.stack(norms))

    return patch.object(ZeroStates, "gradient_norm", own)


def norm_over_padding() -> AbstractContextManager[Any]:
    """Padding is left as memory had it, and memory had something else before."""
    stack = ExitStack()
    stack.enter_context(patch.object(Packing, "gaps", lambda packing: iter(())))
    empty = torch.empty

    def used(*arguments: Any, **options: Any) -> torch.Tensor:
        memory = empty(*arguments, **options)
        return memory.fill_(0.1) if memory.is_floating_point() else memory

    stack.enter_context(patch.object(torch, "empty", used))
    return stack


def gradient_of_an_unused_parameter_left_over() -> AbstractContextManager[Any]:
    send = ReduceScatterBucket.send

    def keep(bucket: ReduceScatterBucket) -> None:
        for slot in bucket.slots:
            slot.filled = True
        send(bucket)

    return patch.object(ReduceScatterBucket, "send", keep)


def shard_from_the_wrong_rank() -> AbstractContextManager[Any]:
    finish = GatheredWhole.finish

    def rotated(whole: GatheredWhole) -> None:
        arrived = whole._handle is not None
        finish(whole)
        if arrived:
            whole.flat.copy_(whole.flat.roll(whole.shard.numel()))

    return patch.object(GatheredWhole, "finish", rotated)


def released_before_backward() -> AbstractContextManager[Any]:
    """Nothing is gathered again when backward arrives."""
    return patch.object(UnitHooks, "_before_backward", lambda hooks, unit: None)


def stale_after_update() -> AbstractContextManager[Any]:
    return patch.object(AlwaysWhole, "publish", lambda whole: None)


def stale_where_it_stays_gathered() -> AbstractContextManager[Any]:
    return patch.object(GatheredUnit, "renew", lambda unit: None)


def update_of_another_shard() -> AbstractContextManager[Any]:
    """The gradient's shard is the next rank's."""

    def other(layout: Layout, flat: torch.Tensor) -> torch.Tensor:
        packing, rank = layout.packing, layout.communicator.rank(layout.axis)
        return flat.narrow(0, (rank + 1) % packing.ranks * packing.shard, packing.shard)

    return patch.object(Layout, "shard_of", other)


def replicas_not_summed() -> AbstractContextManager[Any]:
    return patch.object(ReduceScatterBucket, "sum_replicas", lambda bucket: None)


@dataclass(frozen=True)
class Planted:
    """Where a bug shows.

    Args:
        bug: plants it.
        stages: at which it does.
        case: model and data.
        world: number of ranks.
        zero: keys of the section.
        keys: other keys of the config.
    """

    bug: Bug
    stages: tuple[int, ...] = (1, 2, 3)
    case: Case = BODY
    world: int = 2
    zero: tuple[tuple[str, Any], ...] = ()
    keys: tuple[tuple[str, Any], ...] = ()

    def run(self, stage: int) -> Run:
        settings = config(
            stage, accumulation=2, optimizer=SGD, zero=dict(self.zero), **dict(self.keys)
        )
        return Run(settings, self.case, steps=3)


EACH = (("gradient_reduction", "micro_batch"),)
ONCE = (("gradient_reduction", "boundary"),)
SMALL = (("reduce_bucket_size", 50),)
CLIPPED = (("gradient_clipping", 0.05),)
GROUPS = (("mics_shard_size", 2),)
STAYS = (("stage3_param_persistence_threshold", 10**6),)

PLANTED = [
    Planted(wrong_divisor),
    Planted(missed_accumulation, zero=EACH),
    Planted(overwritten_accumulation, zero=ONCE),
    Planted(one_buffer_for_all_buckets, case=ROUTED, zero=EACH + SMALL),
    Planted(late_gradient_lost, case=REENTRANT, zero=ONCE + SMALL),
    Planted(late_gradient_of_a_round_lost, case=REENTRANT, zero=EACH + SMALL),
    Planted(norm_counted_twice, world=4, zero=GROUPS, keys=CLIPPED),
    Planted(norm_of_own_shard, keys=CLIPPED),
    Planted(norm_over_padding, case=UNEVEN, world=3, zero=EACH + SMALL, keys=CLIPPED),
    Planted(gradient_of_an_unused_parameter_left_over, case=ROUTED, zero=ONCE),
    Planted(shard_from_the_wrong_rank, stages=(3,)),
    Planted(stale_after_update, stages=(1, 2)),
    Planted(stale_where_it_stays_gathered, stages=(3,), zero=STAYS),
    Planted(update_of_another_shard),
    Planted(replicas_not_summed, world=4, zero=GROUPS),
]


def train_with(bug: Bug, run: Run) -> tuple[list[float], Any]:
    with bug():
        return train(run)


def difference(planted: Planted, stage: int, bug: Bug) -> float:
    """Largest relative difference of a loss from plain torch's; infinite if it is no number."""
    run = planted.run(stage)
    answers = run_distributed(train_with, planted.world, bug, run)
    expected, _ = plain(run, planted.world, sgd)
    means = [sum(step) / planted.world for step in zip(*(a[0] for a in answers), strict=True)]
    found = [abs(a - b) / abs(b) for a, b in zip(means, expected, strict=True)]
    return max(d if d == d else float("inf") for d in found)


@pytest.mark.parametrize(
    ("planted", "stage"),
    [
        pytest.param(planted, stage, id=f"{planted.bug.__name__}-{stage}")
        for planted in PLANTED
        for stage in planted.stages
    ],
)
def test_a_planted_bug_is_caught(planted: Planted, stage: int) -> None:
    assert difference(planted, stage, ExitStack) < 1e-6
    assert difference(planted, stage, planted.bug) > 1e-5


def test_a_unit_that_is_released_before_backward_is_an_error() -> None:
    run = Run(config(3), BODY)
    with pytest.raises(RanksFailedError, match="storage of size 0"):
        run_distributed(train_with, 2, released_before_backward, run)
