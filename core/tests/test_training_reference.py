"""Training equals a plain torch loop in one process, for every combination of what core offers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from drivetrain.testing import assert_trains_like_reference

STEPS = 20


def warmup(step: int) -> float:
    """WarmupLR from 0 to 1e-2 in 8 logarithmic steps, one update behind, from its formula."""
    return 1e-2 * min(1.0, math.log(max(step, 1)) / math.log(8))


SCHEDULE = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-2, "warmup_num_steps": 8},
}


def config(world: int, **changes: Any) -> dict[str, Any]:
    accumulation = changes.pop("accumulation", 1)
    return {
        "train_batch_size": 2 * world * accumulation,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        **changes,
    }


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("clipping", [0.0, 0.05])
@pytest.mark.parametrize("scheduled", [False, True])
def test_losses_equal_plain_torch_in_fp32(
    world: int, accumulation: int, clipping: float, scheduled: bool
) -> None:
    settings = config(world, accumulation=accumulation, gradient_clipping=clipping)
    if scheduled:
        settings["scheduler"] = SCHEDULE
    assert_trains_like_reference(
        settings, world, steps=STEPS, rtol=1e-6, learning_rate=warmup if scheduled else None
    )


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize(
    "keys",
    [{}, {"prescale_gradients": True}, {"gradient_predivide_factor": 4.0}],
    ids=["plain", "prescaled", "predivided"],
)
def test_nothing_hides_a_factor_of_the_gradient(
    world: int, accumulation: int, keys: dict[str, Any]
) -> None:
    """Adam's update and a clipped one are the same for the double of a gradient; SGD's is not."""
    sgd = {"type": "SGD", "params": {"lr": 0.1}}
    settings = config(world, accumulation=accumulation, optimizer=sgd, **keys)
    assert_trains_like_reference(settings, world, steps=5, rtol=1e-6)


@pytest.mark.parametrize("model", ["gpt", "tied"])
def test_language_models_train_like_plain_torch(model: str) -> None:
    assert_trains_like_reference(config(2, accumulation=2), 2, model=model, steps=STEPS, rtol=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"type": "Adam", "params": {"lr": 1e-2, "adam_w_mode": False, "weight_decay": 0.1}},
        {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "nesterov": True}},
        {"type": "Adagrad", "params": {"lr": 1e-2}},
        {"type": "RMSprop", "params": {"lr": 1e-3}},
        {"type": "NAdam", "params": {"lr": 1e-3}},
    ],
    ids=lambda optimizer: optimizer["type"],
)
def test_every_kind_of_optimizer_trains_like_its_torch_class(optimizer: dict[str, Any]) -> None:
    settings = config(2, accumulation=2, gradient_clipping=0.1, optimizer=optimizer)
    assert_trains_like_reference(settings, 2, steps=STEPS, rtol=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        {"prescale_gradients": True},
        {"gradient_predivide_factor": 4.0},
        {"sparse_gradients": True},
        {"data_parallel": {"overlap": False}},
        {"data_parallel": {"bucket_bytes": 256, "first_bucket_bytes": 64}},
    ],
    ids=str,
)
def test_how_gradients_travel_does_not_change_what_is_learned(keys: dict[str, Any]) -> None:
    settings = config(3, accumulation=2, gradient_clipping=0.1, **keys)
    assert_trains_like_reference(settings, 3, model="tied", steps=STEPS, rtol=1e-6)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("mode", "bound"),
    [
        ({"bf16": {"enabled": True}}, 2e-2),
        ({"fp16": {"enabled": True, "loss_scale": 128.0}}, 2e-3),
    ],
    ids=["bf16", "fp16"],
)
def test_low_precision_follows_a_reference_with_the_same_rounding(
    world: int, accumulation: int, mode: dict[str, Any], bound: float
) -> None:
    """The bound is about two units of rounding in the mode's mantissa (2^-8, 2^-11): forward and
    backward round alike; only the order in which ranks' gradients are rounded and added differs."""
    settings = config(world, accumulation=accumulation, gradient_clipping=0.1, **mode)
    assert_trains_like_reference(settings, world, steps=STEPS, rtol=bound)
