"""What ``drivetrain explain`` says of a pipeline, and a measured step beside the predicted one."""

from __future__ import annotations

from typing import Any

import pytest
from drivetrain_pipeline.explain import rows
from drivetrain_pipeline.schedules import (
    Costs,
    Timeline,
    beside_prediction,
    measured_costs,
    schedule,
    simulate,
)

from drivetrain.plan.plan import Plan


def explained(micro_batches: int, **section: Any) -> dict[str, str]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "pipeline": section,
    }
    plan = Plan.build(config, world_size=section["stages"])
    return {label: str(value) for label, value in rows(plan)}


def test_the_timeline_the_bubble_and_what_is_held_are_shown() -> None:
    found = explained(4, stages=2)
    assert found["schedule"] == "1f1b, 4 micro-batches"
    assert found["stage 1 holds"] == "part 2 of 2 of the model"
    first, last = found["a step"].splitlines()
    assert first.startswith("stage 0   F0------F1------................B0--------------F2------B1")
    assert last.endswith("bubble  20.0%")
    assert found["bubble"].startswith("20.0% of the devices' time")
    assert found["micro-batches held"] == "2, 1"
    assert found["with gpipe"] == "bubble 20.0%, at most 4 micro-batches held"
    assert found["with zb_h1"].startswith("bubble 7.7%")
    assert "warning" not in found


def test_chunks_of_the_v_are_shown_where_they_are() -> None:
    found = explained(4, stages=2, schedule="zb_v")
    assert found["stage 0 holds"] == "part 1, 4 of 4 of the model"
    assert found["micro-batches held"] == "2, 2"


def test_few_micro_batches_are_a_warning_with_the_bubble() -> None:
    assert "leave stages idle for 60% of a step" in explained(2, stages=4)["warning"]


def test_one_stage_has_no_timeline() -> None:
    assert list(explained(4, stages=1)) == ["stages"]


def test_many_micro_batches_are_drawn_in_part() -> None:
    found = explained(100, stages=2)
    assert "a step, first 24 micro-batches" in found
    assert found["bubble"].startswith("1.0%")


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb_v"])
def test_a_step_that_ran_as_predicted_is_predicted_from_its_own_times(name: str) -> None:
    made = schedule(name, 2, 4)
    costs = Costs((1, 2, 3, 4)[: made.chunks], (2,) * made.chunks, (3,) * made.chunks)
    ran = simulate(made, costs)
    found = beside_prediction(made, ran)
    assert found["measured"] is ran
    assert found["predicted"] == ran


def test_a_step_without_all_passes_predicts_nothing() -> None:
    made = schedule("1f1b", 2, 1)
    some = Timeline.measured([[("F0.0", 0, 1), ("B0.0", 3, 4)], [("F0.1", 1, 2)]])
    with pytest.raises(ValueError, match="no B of chunk 1"):
        measured_costs(made, some)
