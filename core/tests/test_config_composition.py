"""From a raw config to plugins with validated sections; and every way a config can be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field, model_validator

from drivetrain.contracts import Bool, Float, Plugin, PositiveInt, Scalar, Section, Sections
from drivetrain.errors import ConfigError, PluginError
from drivetrain.plan.config.composition import Composition, compose
from drivetrain.plan.known import PLANNED, SECTIONS
from drivetrain.plan.registry import Registry, core_entries
from drivetrain.sections.optimization import GradientClipping, OptimizerSection
from drivetrain.sections.precision import BF16, FP16, CommunicationDataType, DataTypes


class Leaf(Section):
    classes: tuple[str, ...] = ()
    depth: PositiveInt = 1


class Shards(Section):
    """Stands in for a sharding plugin's section."""

    stage: Literal[0, 1, 2, 3] = 0
    bucket_size: PositiveInt = Field(default=5, alias="reduce_bucket_size")
    overlap: Bool | None = None
    threshold: PositiveInt | Literal["max"] = "max"
    leaf: Leaf = Leaf()
    leaves: tuple[Leaf, ...] = ()
    by_name: dict[str, Leaf] = Field(default={})
    loco: Leaf | None = None
    either: Leaf | PositiveInt = 1

    @model_validator(mode="after")
    def _overlap_needs_stage(self) -> Shards:
        if self.overlap and self.stage == 1:
            raise ValueError("overlap needs another stage than 1")
        return self


class Sharding(Plugin):
    name = "sharding"
    sections: ClassVar[Sections] = {"zero_optimization": Shards}

    def enabled(self) -> bool:
        return self.section(Shards).stage > 0


class Offload(Section):
    device: Literal["cpu", "nvme"] | None = None
    ratio: Float = Field(default=1.0, ge=0, le=1)
    path: str = Field(default="")


class Disk(Section):
    queue_depth: PositiveInt = 8
    block: int = 1


class Offloading(Plugin):
    """Grafts two sections into another plugin's and owns one of its own."""

    name = "offloading"
    sections: ClassVar[Sections] = {
        "zero_optimization.offload_optimizer": Offload,
        "aio": Disk,
    }


class Monitor(Section):
    enabled: Bool = False
    output_path: str


class Monitoring(Plugin):
    name = "monitoring"
    sections: ClassVar[Sections] = {"csv_monitor": Monitor}


class Size(Scalar[PositiveInt]):
    root: PositiveInt = 1


class Sized(Plugin):
    name = "sized"
    sections: ClassVar[Sections] = {"tensor_size": Size}


class Silent(Plugin):
    """Owns no section."""

    name = "silent"


REGISTRY = Registry(core_entries()).with_plugins(Sharding, Offloading, Monitoring, Sized, Silent)


def composed(config: dict[str, Any], registry: Registry = REGISTRY) -> Composition:
    return compose(config, registry)


def others(composition: Composition) -> dict[str, Plugin]:
    return {m.plugin.name: m.plugin for m in composition.members if not m.is_core}


def problems(config: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        composed(config)
    return caught.value.problems


# -- what is right ---------------------------------------------------------------------------------


def test_only_plugins_that_the_config_names_take_part() -> None:
    assert others(composed({})) == {}
    assert list(others(composed({"tensor_size": 2}))) == ["sized"]


def test_cores_defaults_take_part_whatever_their_sections_say() -> None:
    members = composed({"fp16": {"enabled": False}}).members
    assert all(member.active for member in members)
    assert {member.plugin.name for member in members} >= {"batch", "precision", "optimization"}


def test_a_dotted_path_is_cut_out_of_the_section_of_another_plugin() -> None:
    found = others(
        composed({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    )
    assert found["sharding"].section(Shards).stage == 2
    assert found["offloading"].section(Offload).device == "cpu"


def test_a_section_that_holds_only_those_of_others_needs_no_owner() -> None:
    config = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert list(others(composed(config))) == ["offloading"]
    config["zero_optimization"]["stage"] = {}
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage"):
        composed(config)


def test_one_object_per_class_holds_all_its_sections() -> None:
    config = {"aio": {"queue_depth": 4}, "zero_optimization": {"offload_optimizer": {"ratio": 1}}}
    offloading = others(composed(config))["offloading"]
    assert offloading.section(Disk).queue_depth == 4
    assert offloading.section(Offload).ratio == 1.0


def test_a_scalar_is_a_section_with_a_root() -> None:
    assert others(composed({"tensor_size": 4}))["sized"].section(Size).root == 4


def test_a_section_may_switch_its_plugin_off() -> None:
    for config in ({"zero_optimization": {"stage": 0}}, {"zero_optimization": {}}):
        (member,) = (m for m in composed(config).members if not m.is_core)
        assert not member.active
    config = {"csv_monitor": {"enabled": False, "output_path": "x"}}
    assert [m.active for m in composed(config).members if not m.is_core] == [False]


def test_auto_is_dropped_wherever_it_stands_so_that_defaults_apply() -> None:
    composition = composed(
        {
            "zero_optimization": {"stage": "auto", "leaf": {"depth": "auto"}},
            "gradient_clipping": "auto",
            "optimizer": {"type": "AdamW", "params": {"weight_decay": "auto", "eps": 1e-6}},
        }
    )
    assert sorted(composition.autos) == [
        "gradient_clipping",
        "zero_optimization.leaf.depth",
        "zero_optimization.stage",
    ]
    assert others(composition)["sharding"].section(Shards).stage == 0
    core = {m.plugin.name: m.plugin for m in composition.members}
    assert core["optimization"].section(GradientClipping).root == 1.0
    assert core["optimization"].section(OptimizerSection).params == {"eps": 1e-6}
    assert 'optimizer.params.weight_decay: "auto", so its' in core["optimization"].notes()[0]


@pytest.mark.parametrize(
    "config",
    [
        {"nonsense": "auto"},
        {"zero_optimization": {"bogus": "auto"}},
        {"fp16": {"enabled": True, "loss_scal": "auto"}},
        {"zero_optimization": {"leaf": {"deep": "auto"}}},
        {"zero_optimization": {"leaves": [{"deep": "auto"}]}},
        {"optimizer": {"type": "AdamW", "parms": "auto"}},
        {"timers": {"throughput": {"enable": "auto"}}},
    ],
    ids=str,
)
def test_auto_makes_no_unknown_key_known(config: dict[str, Any]) -> None:
    (problem,) = problems(config)
    assert ": unknown key" in problem


def test_auto_is_no_section() -> None:
    (problem,) = problems({"zero_optimization": "auto"})
    assert problem.startswith('zero_optimization: expected an object, got "auto"')


def test_a_required_key_that_says_auto_is_not_given() -> None:
    (problem,) = problems({"csv_monitor": {"output_path": "auto"}})
    assert problem.startswith(
        'csv_monitor.output_path: required, but "auto", which counts as unset'
    )


def test_what_means_nothing_here_is_taken_with_a_note() -> None:
    config = {"compute_grad_norm": True, "parameter_alignment": 8, "comms_config": {"a": [1]}}
    members = {member.plugin.name: member.plugin for member in composed(config).members}
    notes = members["legacy"].notes()
    assert [note.partition(":")[0] for note in notes] == list(config)


def test_plugins_key_activates_a_plugin_with_an_empty_section() -> None:
    found = others(composed({"plugins": {"silent": True, "tensor_size": True}}))
    assert list(found) == ["silent", "sized"]
    assert found["sized"].section(Size).root == 1


def test_members_say_why_they_are_there() -> None:
    members = composed({"plugins": {"silent": True}, "tensor_size": 2}).members
    assert {m.plugin.name: m.reason for m in members if not m.is_core} == {
        "silent": "plugins.silent",
        "sized": "config section 'tensor_size'",
    }


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16"])
def test_bf16_has_two_names(spelling: str) -> None:
    composition = composed({spelling: {"enabled": True}})
    core = {m.plugin.name: m.plugin for m in composition.members}
    assert core["precision"].section(BF16).enabled


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16", "torch.bfloat16", "BF16"])
def test_dtypes_have_several_spellings(spelling: str) -> None:
    composition = composed({"communication_data_type": spelling})
    core = {m.plugin.name: m.plugin for m in composition.members}
    assert core["precision"].section(CommunicationDataType).root == "bf16"


def test_jsons_5e8_is_an_integer() -> None:
    composition = composed({"fp16": {"loss_scale_window": 5e2}, "tensor_size": 5e8})
    core = {m.plugin.name: m.plugin for m in composition.members}
    assert core["precision"].section(FP16).loss_scale_window == 500
    assert others(composition)["sized"].section(Size).root == 500_000_000


def test_null_stands_for_the_default_where_a_value_may_be_unset() -> None:
    composition = composed({"steps_per_print": None, "data_types": {"grad_accum_dtype": None}})
    core = {m.plugin.name: m.plugin for m in composition.members}
    assert core["precision"].section(DataTypes).grad_accum_dtype is None


# -- what is wrong ---------------------------------------------------------------------------------

ZERO = "zero_optimization"
WRONG: list[tuple[dict[str, Any], str]] = [
    # misspelt keys at the top
    ({"trian_batch_size": 8}, "trian_batch_size: unknown key; did you mean 'train_batch_size'?"),
    ({"train_batchsize": 8}, "train_batchsize: unknown key; did you mean 'train_batch_size'?"),
    ({"Train_Batch_Size": 8}, "Train_Batch_Size: unknown key; did you mean 'train_batch_size'?"),
    ({"train-batch-size": 8}, "train-batch-size: unknown key; did you mean 'train_batch_size'?"),
    (
        {"train_micro_batch_size": 8},
        "train_micro_batch_size: unknown key; did you mean 'train_micro_batch_size_per_gpu'?",
    ),
    (
        {"gradient_accumulation": 2},
        "gradient_accumulation: unknown key; did you mean 'gradient_accumulation_steps'?",
    ),
    ({"optimiser": {}}, "optimiser: unknown key; did you mean 'optimizer'?"),
    ({"sheduler": {}}, "sheduler: unknown key; did you mean 'scheduler'?"),
    ({"fp_16": {}}, "fp_16: unknown key; did you mean 'fp16'?"),
    ({"bfloat": {}}, "bfloat: unknown key; did you mean 'bfloat16'?"),
    ({"grad_clipping": 1}, "grad_clipping: unknown key; did you mean 'gradient_clipping'?"),
    ({"zero_optimisation": {}}, f"zero_optimisation: unknown key; did you mean '{ZERO}'?"),
    ({"zero": {}}, "zero: unknown key"),
    ({"plugin": {}}, "plugin: unknown key; did you mean 'plugins'?"),
    ({"pipelne": {}}, "pipelne: unknown key; did you mean 'pipeline'?"),
    ({"xyzzy": 1}, "xyzzy: unknown key"),
    # keys that belong into a section
    ({"stage": 1, ZERO: {}}, f"stage: unknown key; did you mean '{ZERO}.stage'?"),
    ({"loss_scale": 1}, "loss_scale: unknown key; did you mean 'fp16.loss_scale'?"),
    ({"params": {}}, "params: unknown key; did you mean 'optimizer.params'?"),
    # misspelt keys inside sections
    ({"fp16": {"enable": True}}, "fp16.enable: unknown key; did you mean 'enabled'?"),
    ({"fp16": {"lossscale": 1}}, "fp16.lossscale: unknown key; did you mean 'loss_scale'?"),
    ({"bf16": {"enabled": True, "x": 1}}, "bf16.x: unknown key"),
    (
        {"optimizer": {"type": "Adam", "param": {}}},
        "optimizer.param: unknown key; did you mean 'pa",
    ),
    (
        {"timers": {"throughputs": {}}},
        "timers.throughputs: unknown key; did you mean 'throughput'?",
    ),
    (
        {"timers": {"throughput": {"synchronised": True}}},
        "timers.throughput.synchronised: unknown key; did you mean 'synchronized'?",
    ),
    ({ZERO: {"stge": 1}}, f"{ZERO}.stge: unknown key; did you mean 'stage'?"),
    (
        {ZERO: {"bucket_size": 1}},
        f"{ZERO}.bucket_size: unknown key; did you mean 'reduce_bucket_si",
    ),
    ({ZERO: {"leaf": {"deth": 1}}}, f"{ZERO}.leaf.deth: unknown key; did you mean 'depth'?"),
    ({ZERO: {"loco": {"deth": 1}}}, f"{ZERO}.loco.deth: unknown key; did you mean 'depth'?"),
    (
        {ZERO: {"leaves": [{}, {"deth": 1}]}},
        f"{ZERO}.leaves[1].deth: unknown key; did you mean 'de",
    ),
    (
        {ZERO: {"by_name": {"a": {"clases": []}}}},
        f"{ZERO}.by_name.a.clases: unknown key; did you me",
    ),
    (
        {ZERO: {"offload_optimiser": {}}},
        f"{ZERO}.offload_optimiser: unknown key; did you mean 'offload_optimizer'?",
    ),
    (
        {ZERO: {"offload_optimizer": {"devise": "cpu"}}},
        f"{ZERO}.offload_optimizer.devise: unknown key; did you mean 'device'?",
    ),
    # wrong types
    ({"train_batch_size": "32"}, 'train_batch_size: expected a number, got "32"'),
    ({"train_batch_size": True}, "train_batch_size: expected a number, got true"),
    ({"train_batch_size": 1.5}, "train_batch_size: expected a whole number, got 1.5"),
    ({"train_batch_size": [8]}, "train_batch_size: expected a number, got [8]"),
    ({"gradient_clipping": "1.0"}, 'gradient_clipping: expected a number, got "1.0"'),
    ({"gradient_clipping": None}, "gradient_clipping: expected a number, got null"),
    ({"fp16": True}, "fp16: expected an object, got true"),
    ({"fp16": None}, "fp16: expected an object, got null"),
    ({"fp16": {"enabled": 1}}, "fp16.enabled: expected true or false, got 1"),
    ({"fp16": {"enabled": "true"}}, 'fp16.enabled: expected true or false, got "true"'),
    ({"optimizer": {"type": 3}}, "optimizer.type: expected a string, got 3"),
    ({"optimizer": {"type": "Adam", "params": []}}, "optimizer.params: expected an object, got []"),
    ({"aio": {"block": "many"}}, 'aio.block: expected a whole number, got "many"'),
    ({ZERO: {"leaf": 3}}, f"{ZERO}.leaf: expected an object, got 3"),
    ({ZERO: {"leaf": {"classes": "A"}}}, f'{ZERO}.leaf.classes: expected a list, got "A"'),
    ({ZERO: {"leaf": {"classes": [3]}}}, f"{ZERO}.leaf.classes[0]: expected a string, got 3"),
    ({ZERO: [1]}, f"{ZERO}: expected an object, got [1]"),
    # wrong values
    ({"train_batch_size": 0}, "train_batch_size: expected a number above 0, got 0"),
    ({"gradient_accumulation_steps": -2}, "gradient_accumulation_steps: expected a number above 0"),
    ({"gradient_clipping": -1}, "gradient_clipping: expected a number of at least 0, got -1"),
    ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale: expected a number of at least 0, got -1"),
    ({"fp16": {"loss_scale": float("inf")}}, "fp16.loss_scale: expected a finite number, got "),
    ({"fp16": {"min_loss_scale": 0}}, "fp16.min_loss_scale: expected a number above 0, got 0"),
    ({"log_level": "lod"}, "log_level: expected 'debug', 'info', 'warning', 'error' or 'critical'"),
    (
        {"checkpoint": {"tag_validation": "wran"}},
        "checkpoint.tag_validation: expected 'Ignore', 'Warn' or 'Fail', got \"Wran\"; did you",
    ),
    (
        {"gradient_allreduce_op": "summ"},
        "gradient_allreduce_op: expected 'mean' or 'sum', got \"sum",
    ),
    ({ZERO: {"stage": 4}}, f"{ZERO}.stage: expected 0, 1, 2 or 3, got 4"),
    ({ZERO: {"threshold": "min"}}, f"{ZERO}.threshold: expected a number or 'max', got \"min\""),
    (
        {ZERO: {"offload_optimizer": {"ratio": 1.5}}},
        f"{ZERO}.offload_optimizer.ratio: expected a nu",
    ),
    ({ZERO: {"stage": 1, "overlap": True}}, f"{ZERO}: overlap needs another stage than 1"),
    ({"csv_monitor": {"enabled": True}}, "csv_monitor.output_path: required, but not given"),
    ({"optimizer": {"params": {"lr": 1}}}, "optimizer: the key 'type' is required, but not given"),
    (
        {"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}},
        "optimizer: params.max_grad_norm is not supported; use gradient_clipping",
    ),
    (
        {"bf16": {"bf16_optimizer_states": True}},
        "bf16: bf16_optimizer_states needs bf16_master_weights_and_grads: true",
    ),
    # owners that are missing
    (
        {"hybrid_engine": {}},
        "hybrid_engine: served by drivetrain-hybrid-engine, which is not released yet",
    ),
    (
        {ZERO: {"offload_param": {}}},
        f"{ZERO}.offload_param: served by drivetrain-offload, which is not installed: pip",
    ),
    (
        {"plugins": {"silnt": True}},
        "plugins.silnt: no plugin of that name is installed; did you me",
    ),
    (
        {"plugins": {"hybrid_engine": True}},
        "plugins.hybrid_engine: served by drivetrain-hybrid-engine, which is not released yet",
    ),
    (
        {"plugins": {"silent": 1}},
        "plugins.silent: expected true (activate the plugin) or the name of",
    ),
    ({"plugins": []}, "plugins: expected an object, got []"),
    (
        {"plugins": {"tensor_size": "acme"}},
        "plugins.tensor_size: 'acme' does not offer tensor_size, which is offered by test_config",
    ),
    ({"plugins": {"csv_monitor": True}}, "csv_monitor.output_path: required, but not given"),
    ({"silent": {}}, "silent: plugin 'silent' (test_config_composition in-process) has no section"),
]


@pytest.mark.parametrize(("config", "start"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_config_is_refused_with_path_and_suggestion(
    config: dict[str, Any], start: str
) -> None:
    (problem,) = problems(config)
    assert problem.startswith(start)
    assert "pydantic" not in problem
    assert "http" not in problem


def test_an_unknown_key_without_a_close_word_gets_no_suggestion() -> None:
    assert problems({"xyzzy": 1}) == ["xyzzy: unknown key"]


def test_a_wrong_value_names_the_plugin_and_its_distribution() -> None:
    (problem,) = problems({"tensor_size": 0})
    assert problem == (
        "tensor_size: expected a number above 0, got 0 "
        "[plugin 'sized' (test_config_composition in-process)]"
    )


def test_all_problems_are_reported_at_once() -> None:
    found = problems(
        {
            "trian_batch_size": 8,
            "fp16": {"enabled": 1, "hysteresis": 0, "enable": True},
            "hybrid_engine": {},
            ZERO: {"stage": 7, "offload_optimizer": {"device": "gpu"}},
        }
    )
    assert sorted(problem.partition(":")[0] for problem in found) == [
        "fp16.enable",
        "fp16.enabled",
        "fp16.hysteresis",
        "hybrid_engine",
        "trian_batch_size",
        f"{ZERO}.offload_optimizer.device",
        f"{ZERO}.stage",
    ]


def test_a_value_that_fits_no_alternative_is_reported_at_its_path_for_each() -> None:
    found = problems({ZERO: {"either": {"deth": 1}}})
    assert [problem.partition(" [")[0] for problem in found] == [
        f"{ZERO}.either.deth: unknown key; did you mean 'depth'?",
        f'{ZERO}.either: expected a number, got {{"deth": 1}}',
    ]


@pytest.mark.parametrize("path", sorted(SECTIONS))
def test_every_first_party_section_names_the_distribution_to_install(path: str) -> None:
    config: dict[str, Any] = {}
    for key in reversed(path.split(".")):
        config = {key: config}
    with pytest.raises(ConfigError) as caught:
        compose(config, Registry(core_entries()))
    how = "not released yet" if SECTIONS[path] in PLANNED else "not installed: pip install"
    wanted = f"{path}: served by {SECTIONS[path]}, which is {how}"
    assert any(problem.startswith(wanted) for problem in caught.value.problems)


def test_an_entry_that_is_no_plugin_class_is_refused_by_name() -> None:
    registry = Registry(core_entries())
    registry.add("plugins", "odd", Leaf)
    with pytest.raises(PluginError, match=r"plugin 'odd' \(test_config_composition in-process\)"):
        compose({"odd": {}}, registry)


def test_unhashable_and_huge_values_are_shown_shortened() -> None:
    (problem,) = problems({"train_batch_size": {"x": "y" * 500}})
    assert problem.startswith('train_batch_size: expected a number, got {"x": "yyy')
    assert len(problem) < 200


def test_the_order_of_members_does_not_depend_on_the_order_of_the_config() -> None:
    names: Sequence[list[str]] = [
        [m.plugin.name for m in composed(config).members]
        for config in ({"aio": {}, "tensor_size": 1}, {"tensor_size": 1, "aio": {}})
    ]
    assert names[0] == names[1]
