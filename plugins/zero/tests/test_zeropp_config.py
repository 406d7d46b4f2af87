"""What cannot be combined is refused before any work, naming both keys."""

from __future__ import annotations

from typing import Any

import pytest

from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan

LOCO = {"err_beta": 0.8, "reset_T": 1024}


def plan(zero: dict[str, Any], world_size: int = 4) -> Plan:
    return Plan.build({"train_batch_size": 8, "zero_optimization": zero}, world_size=world_size)


@pytest.mark.parametrize(
    ("zero", "named"),
    [
        ({"stage": 0, "zero_quantized_weights": True}, ("zero_quantized_weights", "stage 0")),
        ({"stage": 0, "zero_quantized_gradients": True}, ("zero_quantized_gradients", "stage 0")),
        ({"stage": 0, "mics_shard_size": 2}, ("mics_shard_size", "stage 0")),
        ({"stage": 2, "zero_hpz_partition_size": 2}, ("zero_hpz_partition_size", "stage 3")),
        (
            {"stage": 1, "zero_quantized_nontrainable_weights": True},
            ("zero_quantized_nontrainable_weights", "stage 3"),
        ),
        (
            {"stage": 3, "zero_hpz_partition_size": 2, "mics_shard_size": 2},
            ("zero_hpz_partition_size", "mics_shard_size"),
        ),
        (
            {"stage": 2, "zeropp_loco_param": LOCO},
            ("zeropp_loco_param", "zero_quantized_gradients"),
        ),
        (
            {"stage": 2, "zero_ranks_per_node": 2},
            ("zero_ranks_per_node", "zero_quantized_gradients"),
        ),
        ({"stage": 3, "zero_hpz_partition_size": 3}, ("zero_hpz_partition_size", "3", "4")),
        ({"stage": 3, "zero_hpz_partition_size": 8}, ("zero_hpz_partition_size", "8", "4")),
        ({"stage": 1, "mics_shard_size": 3}, ("mics_shard_size", "3", "4")),
        (
            {"stage": 1, "zero_quantized_gradients": True, "zero_ranks_per_node": 3},
            ("zero_ranks_per_node", "is 3", "4"),
        ),
        (
            {
                "stage": 1,
                "zero_quantized_gradients": True,
                "zeropp_loco_param": {"err_beta": 0.0},
            },
            ("zeropp_loco_param.err_beta", "above 0"),
        ),
    ],
)
def test_impossible_combinations_are_refused_by_name(zero, named):
    with pytest.raises(ConfigError) as refusal:
        plan(zero)
    assert "zero_optimization" in str(refusal.value)
    for part in named:
        assert part in str(refusal.value)


def test_either_key_of_loco_may_be_left_out():
    for loco in ({"err_beta": 0.5}, {"reset_T": 10}, {}):
        plan({"stage": 2, "zero_quantized_gradients": True, "zeropp_loco_param": loco})


def test_features_tell_what_is_active():
    features = plan({"stage": 3, "zero_quantized_weights": True}).features()
    assert features["zero_optimization.zero_quantized_weights"] is True
    assert features["zero_optimization.zero_quantized_gradients"] is False
