"""What published configs say about ZeRO is understood, whatever name it has."""

from __future__ import annotations

from typing import Any

import pytest
from drivetrain_zero.section import ZeroSection

from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan

STAGE_3 = {
    "prefetch_bucket_size": 7,
    "param_persistence_threshold": 8,
    "model_persistence_threshold": 9,
    "max_live_parameters": 10,
    "max_reuse_distance": 11,
    "gather_16bit_weights_on_model_save": True,
    "module_granularity_threshold": 12,
    "use_all_reduce_for_fetch_params": True,
    "allgather_sequential": True,
}


def plan(section: dict[str, Any], **config: Any) -> Plan:
    return Plan.build({"train_batch_size": 2, "zero_optimization": section, **config}, world_size=2)


def notes(built: Plan) -> str:
    return "\n".join(built.explain().notes)


def test_names_of_stage_3_need_no_prefix() -> None:
    built = plan({"stage": 3, **STAGE_3})
    prefixed = {f"stage3_{name}": value for name, value in STAGE_3.items()}
    assert built.section(ZeroSection) == ZeroSection(stage=3, **prefixed)
    for name in STAGE_3:
        assert f"zero_optimization.{name}: taken for stage3_{name}" in notes(built)


@pytest.mark.parametrize("name", STAGE_3)
def test_a_wrong_value_is_named_as_it_was_given(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan({"stage": 3, name: "much"})
    (problem,) = caught.value.problems
    assert problem.startswith(f"zero_optimization.{name}: expected ")


def test_a_key_goes_before_its_other_name() -> None:
    built = plan({"stage": 3, "max_live_parameters": 1, "stage3_max_live_parameters": 2})
    assert built.section(ZeroSection).stage3_max_live_parameters == 2
    assert "max_live_parameters: no effect, as stage3_max_live_parameters is given" in notes(built)


@pytest.mark.parametrize("name", STAGE_3)
def test_auto_under_another_name_is_the_default(name: str) -> None:
    built = plan({"stage": 3, name: "auto"})
    assert built.section(ZeroSection) == ZeroSection(stage=3)
    assert f'zero_optimization.{name}: "auto", so its default applies' in notes(built)


def test_old_spellings_and_zeros_are_taken_with_a_note() -> None:
    old = {
        "stage3_gather_fp16_weights_on_model_save": True,
        "sub_group_size": 0,
        "allgather_bucket_size": 0,
        "leaf_module": {"classes": "Block", "name_suffixes": "mlp"},
    }
    built = plan({"stage": 3, **old})
    section = built.section(ZeroSection)
    assert section.stage3_gather_16bit_weights_on_model_save
    assert section.leaf_module.classes == ("Block",)
    for name in old:
        assert f"zero_optimization.{name}: " in notes(built)
