"""What ``drivetrain explain`` says of modifiers."""

from __future__ import annotations

from typing import Any

from compressed_models import group, method
from drivetrain_compression.plugin import rows

from drivetrain.plan import Plan


def test_each_modifier_is_told_with_when_it_does_what() -> None:
    bits = {"start_bits": 8, "target_bits": 5, "quantization_period": 3}
    section: dict[str, Any] = {
        "weight_quantization": method({"schedule_offset": 10}, {"mlp": group(["up"], **bits)}),
        "row_pruning": method({"method": "topk"}, {"mlp": group(["down"], dense_ratio=0.25)}),
    }
    config = {"train_batch_size": 4, "compression_training": section}
    assert rows(Plan.build(config, world_size=1)) == [
        (
            "weight_quantization.different_groups.mlp",
            "up; from step 10 on; 7 bits from step 12; 6 bits from step 15; 5 bits from step 21",
        ),
        (
            "row_pruning.different_groups.mlp",
            "down; from step 1000 on; 25% kept, by learned scores",
        ),
    ]
