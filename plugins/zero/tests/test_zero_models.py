"""Models that are awkward to shard train at every stage to plain torch."""

from __future__ import annotations

import pytest
from zero_harness import IN_FORWARD, SGD, Run, Stage, assert_equal_to_plain, config, sgd
from zero_models import (
    ADAPTED,
    BODY,
    EMBEDDED,
    RECOMPUTED,
    REENTRANT,
    ROUTED,
    SHARED,
    SKIPPING,
    TINY,
    UNEVEN,
    USED_OUTSIDE,
)

from drivetrain.testing.reference import CASES, Case

STAGES = (1, 2, 3, IN_FORWARD)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 3])
def test_uneven_empty_scalar_and_unused_parameters_train(stage: Stage, world: int) -> None:
    settings = config(stage, accumulation=2, gradient_clipping=0.5)
    assert_equal_to_plain(Run(settings, UNEVEN), world)


@pytest.mark.parametrize("stage", STAGES)
def test_more_ranks_than_elements_train(stage: Stage) -> None:
    assert_equal_to_plain(Run(config(stage, gradient_clipping=0.5), TINY), 4)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("reduction", ["micro_batch", "boundary"])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(SHARED, id="tied and called twice"),
        pytest.param(RECOMPUTED, id="checkpointed"),
        pytest.param(REENTRANT, id="checkpointed re-entrantly"),
        pytest.param(ADAPTED, id="adapters on frozen and packed weights"),
        pytest.param(USED_OUTSIDE, id="packed weights used outside of their block"),
        pytest.param(ROUTED, id="experts that a rank does not use"),
        pytest.param(SKIPPING, id="blocks that a rank skips"),
    ],
)
def test_awkward_modules_train(stage: Stage, reduction: str, case: Case) -> None:
    settings = config(
        stage, accumulation=2, gradient_clipping=0.5, zero={"gradient_reduction": reduction}
    )
    assert_equal_to_plain(Run(settings, case), 2)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", [EMBEDDED, CASES["tied"]], ids=["sparse in torch", "dense"])
def test_sparse_embeddings_train(stage: Stage, case: Case) -> None:
    settings = config(stage, accumulation=2, sparse_gradients=True, optimizer=SGD)
    assert_equal_to_plain(Run(settings, case), 2, optimizer=sgd)


@pytest.mark.parametrize(
    "keys",
    [
        {"stage3_prefetch_bucket_size": 0},
        {"stage3_max_reuse_distance": 10**9},
        {"stage3_max_live_parameters": 0},
        {"stage3_param_persistence_threshold": 10**6},
        {"stage3_param_persistence_threshold": 150, "stage3_model_persistence_threshold": 300},
        {"overlap_comm": True},
    ],
    ids=str,
)
def test_when_stage_3_gathers_does_not_change_what_is_learned(keys: dict[str, int]) -> None:
    assert_equal_to_plain(Run(config(3, accumulation=2, zero=keys), BODY), 2)
