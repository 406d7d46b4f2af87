"""The section of the config: what it takes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan


def plan(world_size: int, **section: Any) -> Plan:
    config = {"train_micro_batch_size_per_gpu": 2, "pipeline": section}
    return Plan.build(config, world_size=world_size)


def test_stages_are_ranks_and_data_shards_what_they_leave_over() -> None:
    layout = plan(8, stages=4).layout
    assert layout.size("pp") == 4
    assert layout.size("dp") == 2
    assert layout.group(1, "pp") == (1, 3, 5, 7)


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"stages": 3}, "8 / 3 leaves 2"),
        ({"stages": 0}, "a number above 0"),
        ({"stages": 2, "schedule": "dualpipe"}, "1f1b"),
        ({"stages": 2, "partition": "profile"}, "there are parameters, uniform"),
        ({"stages": 2, "partition": "measured"}, "needs `measured`"),
        ({"stages": 2, "memory_limit": 100}, "only looked at where schedule is fastest"),
        ({"stages": 2, "place": {"model.norm": "middle"}}, "middle"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan(8, **section)


def test_keys_of_deepspeed_are_taken() -> None:
    found = plan(
        2, stages=2, partition="best", pipe_partitioned=False, use_reentrant=True, seed_layers=True
    )
    notes = found.explain().notes
    assert any("pipeline.pipe_partitioned: no effect" in note for note in notes)
