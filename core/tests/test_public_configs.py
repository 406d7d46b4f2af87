"""What published configs hold beside plain numbers: ``"auto"``, and sections that are off."""

from __future__ import annotations

from typing import Any

import pytest

from drivetrain.errors import ConfigError
from drivetrain.plan.config.composition import compose
from drivetrain.plan.known import SECTIONS
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry, core_entries
from drivetrain.sections.optimization import OptimizerSection


def built(config: dict[str, Any]) -> Plan:
    return Plan.build(config, world_size=1)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"train_batch_size": "auto"}, '"auto" for train_batch_size, which counts as unset'),
        (
            {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"},
            '"auto" for train_batch_size and train_micro_batch_size_per_gpu, which counts as unset',
        ),
        ({"train_batch_size": 1e29}, "is too large, the most is 2147483647"),
        ({"train_micro_batch_size_per_gpu": 2**31}, "is too large, the most is 2147483647"),
        (
            {"train_micro_batch_size_per_gpu": 2**20, "gradient_accumulation_steps": 2**20},
            "is too large, the most is 2147483647",
        ),
    ],
)
def test_batch_sizes_that_cannot_be_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Plan.build(config, world_size=2)
    assert words in str(caught.value)


def test_numbers_that_only_a_framework_knows_must_be_filled_in() -> None:
    config = {
        "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "foo": "auto", "betas": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}},
    }
    unfilled = 'is "auto", which nobody has filled in; give a value of your own'
    with pytest.raises(ConfigError) as caught:
        Plan.build({**config, "train_batch_size": 1}, world_size=1)
    assert [problem.split(" [")[0] for problem in caught.value.problems] == [
        f"optimizer.params.lr: {unfilled}",
        "optimizer.params.foo: unknown key",
        f"scheduler.params.total_num_steps: {unfilled}",
    ]
    # Whoever reads a config before the framework has filled it in, as zero.Init does.
    del config["optimizer"]["params"]["foo"]
    plan = Plan.build(config, world_size=1, batch_required=False)
    assert plan.section(OptimizerSection).params == {}
    assert 'optimizer.params.betas: "auto", so its default applies' in plan.explain().notes


def test_explain_shows_dtype_optimizer_and_features() -> None:
    settings = (
        built(
            {
                "train_batch_size": 2,
                "bf16": {"enabled": True},
                "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
                "gradient_clipping": "auto",
            }
        )
        .explain()
        .settings
    )
    assert settings["dtype"] == ("bf16", "bf16.enabled")
    assert settings["optimizer"] == ('AdamW {"lr": 0.1}', "config")
    assert settings["scheduler"] == ("none but the script's", "default")
    assert settings["bf16.enabled"] == (True, "config")
    assert settings["gradient_clipping"] == (1.0, "default")


@pytest.mark.parametrize("path", sorted(SECTIONS))
@pytest.mark.parametrize("off", [{"enabled": False, "x": 1}, {"a": False, "b": {"c": 0}}, None])
def test_a_section_that_is_off_needs_nobody_to_serve_it(path: str, off: Any) -> None:
    config: Any = off
    for key in reversed(path.split(".")):
        config = {key: config}
    composition = compose(config, Registry(core_entries()))
    assert [m for m in composition.members if not m.is_core] == []
    (note,) = composition.notes
    assert note.startswith(f"{path}: no effect, as it is switched off (served by {SECTIONS[path]}")


@pytest.mark.parametrize("on", [{}, {"enabled": True}, {"enabled": "auto"}, {"a": 0, "b": 1}, True])
def test_a_section_that_is_not_off_needs_its_owner(on: Any) -> None:
    with pytest.raises(ConfigError, match="wandb: served by drivetrain-wandb"):
        compose({"wandb": on}, Registry(core_entries()))


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_what_is_offloaded_nowhere_needs_no_package(key: str) -> None:
    config = {"zero_optimization": {"stage": 0, key: {"device": "none", "pin_memory": True}}}
    composition = compose(config, Registry(core_entries()))
    assert len(composition.notes) == 2
