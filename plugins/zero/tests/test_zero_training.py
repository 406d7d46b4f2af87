"""Every stage trains to plain torch, whatever the precision, accumulation, clipping and world.

The tests take pairs of these. With ``DRIVETRAIN_TEST_ALL`` set they take the whole product.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from zero_harness import PRECISIONS, SGD, Run, assert_equal_to_plain, config, sgd
from zero_models import BODY

from drivetrain.testing.reference import CASES

STAGES = (1, 2, 3)
WORLDS = (1, 2, 3, 4, 8)
VALUES: Sequence[Sequence[Any]] = (
    tuple(PRECISIONS),
    (1, 3),  # accumulation
    (0.0, 0.05),  # clipping; what is not 0 binds in every step
    (None, "micro_batch", "boundary"),
)


def rows() -> Iterator[tuple[Any, ...]]:
    """Stage, world, and a choice of the other values that contains all pairs over the worlds."""
    choices = list(product(*VALUES))
    if os.environ.get("DRIVETRAIN_TEST_ALL"):
        yield from (
            (stage, world, *choice)
            for stage, world in product(STAGES, WORLDS)
            for choice in choices
        )
        return
    for number, (stage, world) in enumerate(product(STAGES, WORLDS)):
        for place, precision in enumerate(PRECISIONS):
            turn = number + number // len(WORLDS) + place
            reduction = VALUES[3][(turn + place) % 3]
            yield stage, world, precision, (1, 3)[turn % 2], (0.0, 0.05)[turn // 2 % 2], reduction


@pytest.mark.parametrize(
    ("stage", "world", "precision", "accumulation", "clipping", "reduction"), list(rows())
)
def test_every_stage_trains_like_plain_torch(
    stage: int, world: int, precision: str, accumulation: int, clipping: float, reduction: str
) -> None:
    mode, _, bound = PRECISIONS[precision]
    settings = config(
        stage,
        accumulation=accumulation,
        gradient_clipping=clipping,
        zero={"gradient_reduction": reduction, "reduce_bucket_size": 100},
        **mode,
    )
    assert_equal_to_plain(Run(settings, BODY), world, rtol=bound)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", ["gpt", "tied"])
def test_language_models_train_for_twenty_steps(stage: int, case: str) -> None:
    settings = config(stage, accumulation=2, gradient_clipping=0.1)
    # The gradient of a key's bias is zero but for rounding, which Adam makes a step of.
    assert_equal_to_plain(Run(settings, CASES[case], steps=20), 2, compare_parameters=False)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("reduction", ["micro_batch", "boundary"])
def test_states_sharded_over_a_part_of_the_ranks_train(
    stage: int, shards: int, reduction: str
) -> None:
    zero = {"mics_shard_size": shards, "gradient_reduction": reduction}
    settings = config(stage, accumulation=2, gradient_clipping=0.05, zero=zero)
    assert_equal_to_plain(Run(settings, BODY), 4)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "keys",
    [
        {"prescale_gradients": True},
        {"gradient_predivide_factor": 4.0},
        {"data_types": {"grad_accum_dtype": "fp32"}},
        {"bf16": {"enabled": True}, "communication_data_type": "fp32"},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    ],
    ids=str,
)
def test_how_gradients_travel_does_not_change_what_is_learned(
    stage: int, keys: dict[str, Any]
) -> None:
    settings = config(stage, accumulation=2, gradient_clipping=0.1, **keys)
    low = "bf16" in keys or "torch_autocast" in keys
    assert_equal_to_plain(
        Run(settings, BODY), 3, rtol=2e-2 if low else 1e-6, compare_parameters=not low
    )


# -- optimizers ------------------------------------------------------------------------------------


def torch_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, weight_decay=0.01)


def torch_rmsprop(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5)


def two_groups(module: nn.Module) -> list[dict[str, Any]]:
    parameters = list(module.parameters())
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    return [
        {"params": matrices, "weight_decay": 0.2},
        {"params": vectors, "weight_decay": 0.0, "lr": 3e-3},
    ]


def plain_groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    module = nn.ParameterList(parameters)
    return torch.optim.AdamW(two_groups(module), lr=1e-2)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("client", [torch_adam, torch_rmsprop])
def test_a_clients_optimizer_is_sharded(stage: int, client: Any) -> None:
    settings = config(stage, accumulation=2, gradient_clipping=0.1)
    assert_equal_to_plain(Run(settings, BODY, optimizer=client), 2, optimizer=client)


@pytest.mark.parametrize("stage", STAGES)
def test_a_clients_optimizer_with_groups_is_sharded(stage: int) -> None:
    run = Run(config(stage, accumulation=2), BODY, optimizer=torch_adam, groups=two_groups)
    assert_equal_to_plain(
        run, 2, optimizer=lambda parameters: torch_adam(two_groups(nn.ParameterList(parameters)))
    )


@pytest.mark.parametrize("stage", STAGES)
def test_groups_keep_their_own_settings(stage: int) -> None:
    settings = config(stage, gradient_clipping=0.1)
    assert_equal_to_plain(Run(settings, BODY, groups=two_groups), 3, optimizer=plain_groups)


def warmed_up(step: int) -> float:
    """Linear over 4 steps and one update behind, as WarmupLR is."""
    return 0.1 * min(1.0, max(step - 1, 0) / 4)


@pytest.mark.parametrize("stage", STAGES)
def test_schedules_reach_the_shards(stage: int) -> None:
    schedule = {
        "type": "WarmupLR",
        "params": {
            "warmup_min_lr": 0.0,
            "warmup_max_lr": 0.1,
            "warmup_num_steps": 4,
            "warmup_type": "linear",
        },
    }
    run = Run(config(stage, scheduler=schedule, optimizer=SGD), BODY, steps=6)
    assert_equal_to_plain(
        run, 2, optimizer=sgd, learning_rate=lambda s: 0.1 * min(1.0, max(s - 1, 0) / 4)
    )
