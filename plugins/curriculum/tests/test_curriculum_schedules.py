"""Difficulties are those of the published formulas, and broken sections are refused."""

from __future__ import annotations

from typing import Any

import pytest
from drivetrain_curriculum import Curriculum, CurriculumSection, Pacing, difficulty_at
from pydantic import ValidationError

from drivetrain.errors import ConfigError, TrainingError
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry
from drivetrain.testing import PluginConformance
from drivetrain.testing.parts import SharedSequences

LINEAR = {
    "enabled": True,
    "min_difficulty": 2,
    "max_difficulty": 10,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 8, "difficulty_step": 2},
}


class TestCurriculum(PluginConformance):
    plugin = Curriculum
    config = {"curriculum_learning": LINEAR}


def section(**changes: Any) -> CurriculumSection:
    return CurriculumSection.model_validate({**LINEAR, **changes})


def root(total: int, step: int, degree: float) -> dict[str, Any]:
    config = {"total_curriculum_step": total, "difficulty_step": step, "root_degree": degree}
    return {"schedule_type": "fixed_root", "schedule_config": config}


DISCRETE = {
    "schedule_type": "fixed_discrete",
    "schedule_config": {"difficulty": [1, 2, 3, 4, 5], "max_step": [2, 4, 6, 8]},
    "min_difficulty": 1,
    "max_difficulty": 5,
}
CUSTOM = {"schedule_type": "custom", "schedule_config": {}}


def difficulties(steps: range, **changes: Any) -> list[int]:
    return [difficulty_at(step, section(**changes)) for step in steps]


def test_fixed_linear_grows_in_even_steps_and_stays() -> None:
    assert difficulties(range(1, 11)) == [2, 4, 4, 6, 6, 8, 8, 10, 10, 10]


def test_fixed_linear_of_ten_steps() -> None:
    config = {"total_curriculum_step": 10, "difficulty_step": 2}
    seen = {step: difficulty_at(step, section(schedule_config=config)) for step in (1, 5, 9, 10)}
    assert seen == {1: 2, 5: 6, 9: 8, 10: 10}


def test_fixed_root_of_degree_two_grows_with_the_square_root() -> None:
    # sqrt(t / 16) * 64 + 0 at t = 1, 4, 9, 16: 16, 32, 48, 64; 2 gives 22.6, 3 gives 27.7
    changes = {**root(16, 1, 2), "min_difficulty": 1, "max_difficulty": 65}
    seen = {t: difficulty_at(t, section(**changes)) for t in (1, 2, 3, 4, 9, 16, 17)}
    assert seen == {1: 17, 2: 23, 3: 28, 4: 33, 9: 49, 16: 65, 17: 65}


def test_fixed_root_of_degree_one_is_linear() -> None:
    assert difficulties(range(1, 11), **root(8, 2, 1)) == difficulties(range(1, 11))


def test_fixed_discrete_keeps_a_stage_up_to_its_last_step() -> None:
    assert difficulties(range(1, 11), **DISCRETE) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_rounding_does_not_go_below_the_first_difficulty() -> None:
    config = {"total_curriculum_step": 100, "difficulty_step": 8}
    assert difficulty_at(1, section(min_difficulty=3, schedule_config=config)) == 3


def test_the_largest_difficulty_is_kept_once_reached() -> None:
    pacing = Pacing(section(**CUSTOM))
    pacing.schedule = lambda step: {1: 4, 2: 10}.get(step, 6)
    assert pacing.current == 2
    assert [pacing.update(step) for step in (1, 2, 3)] == [4, 10, 10]


def test_custom_without_a_function_says_how_to_set_it() -> None:
    with pytest.raises(ConfigError, match=r"call drivetrain_curriculum\.set_schedule"):
        Pacing(section(**CUSTOM)).update(1)


@pytest.mark.parametrize("answer", [0, -3, 2.5, True, None])
def test_a_function_that_answers_no_length_is_refused(answer: Any) -> None:
    pacing = Pacing(section(**CUSTOM))
    pacing.schedule = lambda step: answer
    with pytest.raises(TrainingError, match=f"answered {answer!r} for step 7"):
        pacing.update(7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_difficulty": None}, "needs min_difficulty"),
        ({"schedule_type": None}, "needs schedule_type"),
        ({"min_difficulty": 11}, "min_difficulty 11 is larger than max_difficulty 10"),
        ({"schedule_type": "fixed_square"}, "schedule_type"),
        ({"curriculum_type": "vocabulary"}, "seqlen"),
        ({"schedule_config": {}}, "has the keys difficulty_step, total_curriculum_step; got"),
        (
            {"schedule_config": {**LINEAR["schedule_config"], "root_degree": 2}},
            "got difficulty_step, root_degree",
        ),
        (
            {**DISCRETE, "schedule_config": {"difficulty": [1, 2], "max_step": [1, 2]}},
            "difficulty has 2 stages and max_step ends 2",
        ),
        (
            {**DISCRETE, "schedule_config": {"difficulty": [1, 2, 3], "max_step": [5, 2]}},
            "max_step must not fall",
        ),
    ],
)
def test_an_inconsistent_section_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(**changes)


def test_a_section_that_is_off_need_not_be_complete() -> None:
    assert not CurriculumSection(enabled=False).enabled


def plan(**keys: Any) -> Plan:
    config = {"train_batch_size": 2, "curriculum_learning": LINEAR, **keys}
    registry = Registry.installed().with_plugins(Curriculum, SharedSequences)
    return Plan.build(config, world_size=2, registry=registry)


def test_sequences_that_are_spread_over_ranks_cannot_be_cut() -> None:
    section = {"curriculum_learning": {**LINEAR, "truncate": True}}
    with pytest.raises(ConfigError, match=r"curriculum_learning\.truncate: a sequence is spread"):
        plan(**section, sequence_parallel_size=2)
    assert plan(**section)
    assert plan(sequence_parallel_size=2)


def test_a_step_that_slows_matrix_units_down_is_remarked() -> None:
    assert any("difficulty_step: 2 is no multiple of 8" in note for note in plan().explain().notes)
