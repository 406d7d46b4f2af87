"""``overlap_param_gather``: what was updated is gathered in the next forward, and then kept."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from zero_harness import (
    IN_FORWARD,
    PRECISIONS,
    Run,
    assert_equal_to_plain,
    batches,
    config,
    run_engine,
    whole_parameters,
)
from zero_models import ADAPTED, BODY

from drivetrain.contracts import Purpose
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

UNITS = 4
"""Three blocks of the model, and the root with its head."""


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("reduction", ["micro_batch", "boundary"])
def test_it_trains_like_plain_torch(precision: str, world: int, reduction: str) -> None:
    mode, _, bound = PRECISIONS[precision]
    zero = {"gradient_reduction": reduction}
    settings = config(IN_FORWARD, accumulation=3, gradient_clipping=0.05, zero=zero, **mode)
    assert_equal_to_plain(Run(settings, BODY), world, rtol=bound)


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 1},
        {"overlap_comm": False},
        {"stage3_prefetch_bucket_size": 0},
        {"mics_shard_size": 2},
        {"enable_sanity_checks": True},
    ],
    ids=str,
)
def test_it_trains_with_other_settings(zero: dict[str, Any]) -> None:
    settings = config(IN_FORWARD, accumulation=2, zero=zero)
    assert_equal_to_plain(Run(settings, BODY), 4)


def gathers(engine: Engine) -> int:
    return engine.job.byte_log.total(purpose=Purpose.WEIGHT).calls


def counted(run: Run) -> list[tuple[int, int, int, int]]:
    """Gathers begun in two forwards of a window, in their backwards, and by the update."""
    engine, found = run.engine(), []
    for step in batches(run, engine.job.world_size):
        marks = [gathers(engine)]
        for micro in step:
            loss = engine(*micro[engine.job.rank])
            marks.append(gathers(engine))
            engine.backward(loss)
            marks.append(gathers(engine))
            engine.step()
        marks.append(gathers(engine))
        first, back, second, again, update = (b - a for a, b in pairwise(marks))
        found.append((first, second, back + again, update))
    engine.destroy()
    return found


@pytest.mark.parametrize("ahead", [0, 10**6])
def test_every_unit_is_gathered_once_an_update_and_the_first_begins_before_forward(
    ahead: int,
) -> None:
    zero = {"stage3_prefetch_bucket_size": ahead}
    run = Run(config(IN_FORWARD, accumulation=2, zero=zero), BODY, steps=3)
    begun = UNITS if ahead else 1
    for first, *later in run_distributed(counted, 2, run):
        assert first == (UNITS, 0, 0, begun)
        assert later == [(UNITS - begun, 0, 0, begun)] * 2


def seen(run: Run) -> tuple[bool, bool, bool]:
    """Whether trained parameters are numbers after a step, whole, and frozen ones at any time."""
    engine = run.engine()
    run_engine(engine, [batches(run, 2)[0][0][engine.job.rank]], 0)
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    frozen = [p for p in engine.module.parameters() if not p.requires_grad]
    bare = any(bool(p.isfinite().all()) for p in trained)
    kept = all(bool(p.isfinite().all()) for p in frozen)
    whole = all(bool(v.isfinite().all()) for v in whole_parameters(engine).values())
    engine.destroy()
    return bare, whole, kept


def test_between_steps_trained_parameters_are_read_whole_or_as_nan() -> None:
    zero = {"overlap_comm": False}
    for bare, whole, kept in run_distributed(seen, 2, Run(config(IN_FORWARD, zero=zero), ADAPTED)):
        assert not bare
        assert whole
        assert kept


def test_it_changes_nothing_at_stage_3() -> None:
    found = []
    for given in (False, True):
        zero = {"overlap_param_gather": given, "overlap_comm": True}
        run = Run(config(3, accumulation=2, zero=zero), BODY, steps=3)
        found.append(run_distributed(counted, 2, run))
    assert found[0] == found[1]
