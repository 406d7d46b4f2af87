"""From a config to a plan: world, mesh, batch, checks, features, fingerprint, explanation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

import drivetrain
from drivetrain.contracts import (
    Atom,
    AxisRequest,
    Batch,
    Bool,
    Conflict,
    Plugin,
    PositiveInt,
    Problem,
    Scalar,
    Section,
    Sections,
    SplitAxis,
    hookimpl,
)
from drivetrain.errors import ConfigError, PluginError
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry, core_entries
from drivetrain.sections.batch import ManagedAccumulation
from drivetrain.sections.checkpoints import CheckpointSection
from drivetrain.sections.data import Seed
from drivetrain.sections.data_parallel import DataParallel
from drivetrain.sections.mesh import AcceleratorName
from drivetrain.sections.observability import LogLevel, StepsPerPrint, Timers
from drivetrain.sections.optimization import GradientClipping, OptimizerSection
from drivetrain.sections.precision import BF16, FP16, DataTypes, TorchAutocast
from drivetrain.testing.parts import SharedSequences


class Tensor(Section):
    size: PositiveInt = 1


class TensorPlugin(Plugin):
    name = "tensor"
    sections: ClassVar[Sections] = {"tensor": Tensor}

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return [Atom("tp", self.section(Tensor).size, source="tensor.size")]

    def features(self) -> Mapping[str, object]:
        return {"tensor.size": self.section(Tensor).size}


class Experts(Section):
    enabled: Bool = True
    size: PositiveInt = 1


class ExpertsPlugin(Plugin):
    name = "experts"
    sections: ClassVar[Sections] = {"experts": Experts}

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return [SplitAxis("ep", self.section(Experts).size, source="experts.size")]

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        if plan.section(Experts).size > 4:
            return [Problem("experts.size", "is larger than 4")]
        return []

    def features(self) -> Mapping[str, object]:
        return {"experts.size": self.section(Experts).size}

    def conflicts(self) -> Sequence[Conflict]:
        return [
            Conflict("experts.size", 2, "tensor.size", 2, "both would slice one weight"),
            Conflict("experts.size", 3, "tensor.size", None, "three divides nothing"),
        ]


class Elastic(Scalar[PositiveInt]):
    root: PositiveInt = 1


class ElasticPlugin(Plugin):
    """Overrides core's answer to the batch."""

    name = "elastic"
    sections: ClassVar[Sections] = {"elastic": Elastic}

    @hookimpl
    def plan_batch(self, plan: Plan) -> Batch:
        shards = plan.layout.size("dp")
        return Batch(self.section(Elastic).root * shards, self.section(Elastic).root, 1, shards)


REGISTRY = Registry(core_entries()).with_plugins(
    TensorPlugin, ExpertsPlugin, ElasticPlugin, SharedSequences
)


@pytest.fixture(autouse=True)
def no_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def built(config: Mapping[str, Any], world_size: int | None = None, **options: Any) -> Plan:
    return Plan.build(config, world_size=world_size, registry=REGISTRY, **options)


def refused(config: Mapping[str, Any], world_size: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        built(config, world_size)
    return caught.value.problems


# -- world, mesh, batch ----------------------------------------------------------------------------


def test_the_world_size_is_the_argument_else_the_environment_else_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {"train_micro_batch_size_per_gpu": 1}
    plan = built(config)
    assert (plan.world_size, plan.world_source) == (1, "the default (WORLD_SIZE is not set)")
    monkeypatch.setenv("WORLD_SIZE", "4")
    plan = built(config)
    assert (plan.world_size, plan.world_source) == (4, "WORLD_SIZE")
    plan = built(config, 2)
    assert (plan.world_size, plan.world_source) == (2, "the world_size argument")


@pytest.mark.parametrize("value", ["0", "-1", "two", "", "1.5"])
def test_a_world_size_that_is_no_positive_number_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    assert refused({}) == [
        f"the world size must be a positive number, got {value!r} from WORLD_SIZE"
    ]


def test_plugins_shape_the_mesh_and_the_rest_is_data_parallel() -> None:
    config = {"train_batch_size": 24, "tensor": {"size": 2}, "experts": {"size": 4}}
    plan = built({**config, "sequence_parallel_size": 2}, 24)
    sizes = {axis: plan.layout.size(axis) for axis in ("dp", "sp", "tp", "ep", "edp", "data")}
    assert sizes == {"dp": 6, "sp": 2, "tp": 2, "ep": 4, "edp": 3, "data": 12}
    assert plan.batch == Batch(24, 4, 1, 6)


def test_the_batch_error_shows_arithmetic_and_origin_of_every_factor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = {
        "train_batch_size": 33,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "tensor": {"size": 2},
    }
    (problem,) = refused(config)
    assert problem.startswith(
        "train_batch_size 33 != 2 (train_micro_batch_size_per_gpu) x 4 "
        "(gradient_accumulation_steps) x 4 (data shards = 8 ranks from WORLD_SIZE / "
        "tp 2 from tensor.size) = 32;"
    )


@pytest.mark.parametrize("steps", [{}, {"gradient_accumulation_steps": 2}])
def test_a_batch_size_is_required_unless_the_plan_only_serves(steps: dict[str, int]) -> None:
    (problem,) = refused(steps, 2)
    assert problem.startswith("one of train_batch_size and train_micro_batch_size_per_gpu is")
    assert built(steps, 2, batch_required=False).batch is None
    config = {"train_batch_size": 4, **steps}
    assert built(config, 1, batch_required=False).batch is not None


def test_a_plugin_may_decide_the_batch_instead_of_core() -> None:
    assert built({"elastic": 3}, 4).batch == Batch(12, 3, 1, 4)


def test_a_mesh_that_does_not_fit_the_world_names_the_world_and_the_key() -> None:
    (problem,) = refused({"train_batch_size": 8, "tensor": {"size": 3}}, 8)
    assert "8 ranks cannot be divided" in problem
    assert "tp 3" in problem
    assert problem.endswith("(world size 8 from the world_size argument)")
    (problem,) = refused({"train_batch_size": 8, "data_parallel_size": 3}, 8)
    assert "dp 3 needs 3 ranks, but the world has 8" in problem


# -- checks across sections ------------------------------------------------------------------------


def test_problems_of_checks_conflicts_and_batch_are_reported_together() -> None:
    config = {
        "train_batch_size": 3,
        "fp16": {"enabled": True},
        "bf16": {"enabled": True},
        "tensor": {"size": 2},
        "experts": {"size": 2},
        "optimizer": {"type": "Adma"},
    }
    problems = refused(config, 4)
    assert sorted(p.partition(":")[0].partition(" =")[0].partition(" 3")[0] for p in problems) == [
        "bf16.enabled",
        "experts.size",
        "optimizer.type",
        "train_batch_size",
    ]


@pytest.mark.parametrize(
    ("tensor", "experts", "expected"),
    [
        (
            2,
            2,
            "experts.size = 2 cannot be combined with tensor.size = 2: both would slice one weight",
        ),
        (1, 3, "experts.size = 3 cannot be combined with tensor.size = 1: three divides nothing"),
    ],
)
def test_a_conflict_names_both_keys_their_values_and_the_reason(
    tensor: int, experts: int, expected: str
) -> None:
    config = {"train_batch_size": 12, "tensor": {"size": tensor}, "experts": {"size": experts}}
    assert refused(config, 12) == [expected]


@pytest.mark.parametrize("enabled", [True, False])
def test_a_plugin_that_is_switched_off_neither_shapes_nor_checks_nor_conflicts(
    enabled: bool,
) -> None:
    config = {
        "train_batch_size": 4,
        "tensor": {"size": 2},
        "experts": {"size": 2, "enabled": enabled},
    }
    if enabled:
        assert refused(config, 4)
    else:
        plan = built(config, 4)
        assert "ep" not in plan.layout.axes
        assert "experts.size" not in plan.features()
        assert "experts" not in plan.hub.plugins
        assert plan.section(Experts) == Experts(enabled=False, size=2)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
            "bf16.enabled: cannot be combined with fp16.enabled",
        ),
        (
            {"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}},
            "torch_autocast.enabled: cannot be combined with bf16.enabled",
        ),
        ({"bf16": {}, "bfloat16": {}}, "bfloat16: is another name of bf16, which is given too"),
        ({"data_types": {"param_dtype": "fp16"}}, "data_types.param_dtype: is fp16, but the mode"),
        ({"amp": {"enabled": True}}, "amp: apex is not supported; use torch_autocast"),
        ({"nebula": {"enabled": True, "x": 1}}, "nebula: this checkpoint service is not supported"),
        ({"datastates_ckpt": {}}, "datastates_ckpt: this checkpoint engine is not supported"),
        (
            {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
            "gradient_predivide_factor: is 2.0, which prescale_gradients: true would ignore",
        ),
        (
            {"optimizer": {"type": "AdmaW"}},
            "optimizer.type: no optimizer is named 'AdmaW'; did you",
        ),
        (
            {"optimizer": {"type": "onebitadam"}},
            "optimizer.type: 'onebitadam' is served by drivetrain-onebit, which is not installed",
        ),
        (
            {"optimizer": {"type": "muon"}},
            "optimizer.type: 'muon' is served by drivetrain-optimizers, which is not installed",
        ),
        (
            {"scheduler": {"type": "WarmupLRR"}},
            "scheduler.type: no scheduler is named 'WarmupLRR'; did you mean 'WarmupLR'?",
        ),
    ],
)
def test_core_checks_its_own_sections_against_each_other(
    config: dict[str, Any], problem: str
) -> None:
    (found,) = refused({"train_batch_size": 1, **config})
    assert found.startswith(problem)


@pytest.mark.parametrize("name", ["Adam", "adamw", "ADAGRAD", "SGD", "rmsprop"])
def test_optimizers_of_core_and_torch_are_known_in_any_case(name: str) -> None:
    plan = built({"train_batch_size": 1, "optimizer": {"type": name}})
    assert plan.section(OptimizerSection).type == name


def test_what_frameworks_write_by_default_is_accepted() -> None:
    plan = built(
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "fp16": {
                "enabled": "auto",
                "loss_scale": 0,
                "loss_scale_window": 1000,
                "initial_scale_power": 16,
                "hysteresis": 2,
                "min_loss_scale": 1,
            },
            "bf16": {"enabled": "auto"},
            "amp": {"enabled": "auto", "opt_level": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "betas": "auto"}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto"}},
            "steps_per_print": 2000,
            "wall_clock_breakdown": False,
            "zero_allow_untested_optimizer": True,
        },
        2,
    )
    assert plan.batch == Batch(4, 2, 1, 2)
    assert plan.section(GradientClipping).root == 1.0
    assert plan.section(OptimizerSection).params == {"lr": 2e-5}


# -- access ----------------------------------------------------------------------------------------


def test_sections_are_found_by_class_with_defaults_when_absent() -> None:
    plan = built({"train_batch_size": 1, "seed": 7, "log_level": "WARNING"})
    assert plan.section(Seed).root == 7
    assert plan.section(LogLevel).root == "warning"
    assert plan.section(Tensor) == Tensor(size=1)
    assert plan.section(OptimizerSection).type is None


def test_defaults_of_cores_sections() -> None:
    plan = built({"train_batch_size": 1})
    assert plan.section(GradientClipping).root == 1.0
    assert plan.section(StepsPerPrint).root is None
    assert plan.section(Seed).root == 1234
    assert plan.section(AcceleratorName).root == "auto"
    assert plan.section(ManagedAccumulation).root is True
    assert plan.section(DataTypes).grad_accum_dtype is None
    assert plan.section(BF16).check_grad_overflow is True
    assert plan.section(TorchAutocast).dtype == "bf16"
    assert plan.section(CheckpointSection).tag_validation == "Warn"
    assert plan.section(Timers).throughput.enabled is True
    assert plan.section(DataParallel) == DataParallel(
        bucket_bytes=26_214_400, first_bucket_bytes=1_048_576, overlap=True
    )
    fp16 = plan.section(FP16)
    assert (fp16.enabled, fp16.loss_scale, fp16.initial_scale_power) == (False, 0.0, 16)
    assert (fp16.loss_scale_window, fp16.hysteresis, fp16.min_loss_scale) == (1000, 2, 1.0)


def test_every_field_of_cores_sections_is_described() -> None:
    silent = []
    for entry in core_entries():
        if entry.group != "plugins":
            continue
        model = entry.load().sections[entry.name]
        if not (model.__doc__ or "").strip():
            silent.append(entry.name)
        fields = {} if "root" in model.model_fields else model.model_fields
        silent += [
            f"{entry.name}.{name}" for name, field in fields.items() if not field.description
        ]
    assert silent == []


def test_features_hold_the_values_of_active_plugins() -> None:
    features = built({"train_batch_size": 2, "tensor": {"size": 2}}, 2).features()
    assert features["tensor.size"] == 2
    assert features["fp16.enabled"] is False
    assert "experts.size" not in features


def test_plugins_list_is_what_the_hub_holds() -> None:
    plan = built({"train_batch_size": 2, "tensor": {}, "experts": {"enabled": False}}, 2)
    assert {plugin.name for plugin in plan.plugins} == set(plan.hub.plugins)
    assert "tensor" in plan.hub.plugins


def test_two_plans_share_nothing() -> None:
    first = built({"train_batch_size": 2, "tensor": {}}, 2)
    second = built({"train_batch_size": 2, "tensor": {}}, 2)
    assert first.hub is not second.hub
    assert not {id(p) for p in first.plugins} & {id(p) for p in second.plugins}


# -- sources, fingerprint, explanation -------------------------------------------------------------


def test_overlays_are_part_of_the_merged_config(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"train_batch_size": 8, "tensor": {"size": 1},}')
    plan = Plan.build(path, overlays=["tensor.size=2", "seed=3"], world_size=4, registry=REGISTRY)
    assert plan.config == {"train_batch_size": 8, "tensor": {"size": 2}, "seed": 3}
    assert plan.batch == Batch(8, 4, 1, 2)
    assert plan.section(Seed).root == 3


def test_the_fingerprint_tells_apart_what_ranks_must_agree_on() -> None:
    config = {"train_batch_size": 2, "tensor": {"size": 1}, "experts": {"enabled": False}}
    found = built(config, 2).fingerprint()
    assert found["drivetrain"] == drivetrain.__version__
    assert found["config"] == config
    assert found["plugins"]["tensor"] == "test_plan in-process"
    assert found["plugins"]["batch"] == f"drivetrain {drivetrain.__version__}"
    assert "experts" not in found["plugins"]
    assert json.dumps(found) == json.dumps(built(config, 2).fingerprint())
    assert built(config, 2, overlays=["seed=1"]).fingerprint() != found


def test_the_explanation_says_what_is_active_why_and_in_which_order() -> None:
    config = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": "auto",
        "tensor": {"size": 2},
        "elastic": 4,
        "experts": {"enabled": False},
        "disable_allgather": True,
        "vocabulary_size": 50257,
        "checkpoint": {"load_universal": True},
    }
    plan = built(config, 4)
    explanation = plan.explain()
    tensor = "plugin 'tensor' (test_plan in-process)"
    elastic = "plugin 'elastic' (test_plan in-process)"
    core = f"(drivetrain {drivetrain.__version__})"
    assert explanation.plugins[tensor] == ("config section 'tensor'", True)
    assert explanation.plugins["plugin 'experts' (test_plan in-process)"][1] is False
    assert explanation.plugins[f"plugin 'batch' {core}"] == ("core's default", True)
    assert explanation.hooks["plan_batch"] == [elastic, f"plugin 'batch' {core}"]
    assert explanation.hooks["mesh_axes"] == [tensor, f"plugin 'mesh' {core}"]
    assert explanation.mesh["dp"] == 2
    assert explanation.values["world_size"] == (4, "the world_size argument")
    assert explanation.values["data_shards"] == (
        2,
        "4 ranks from the world_size argument / tp 2 from tensor.size",
    )
    assert explanation.values["train_batch_size"] == (8, "config")
    assert explanation.values["gradient_accumulation_steps"] == (1, "derived from the others")
    assert sorted(explanation.notes) == [
        "checkpoint.load_universal: no effect, every checkpoint loads into any layout",
        "disable_allgather: no effect, whoever shards parameters publishes them",
        'gradient_accumulation_steps: "auto", so its default applies',
        "vocabulary_size: 50257 is no multiple of 8; matrix units are faster at 50264",
    ]


def test_keys_that_are_only_accepted_are_noted_where_they_are_given() -> None:
    optimizer = {"type": "Adam", "legacy_fusion": True}
    config = {"bf16": {"immediate_grad_update": True}, "optimizer": optimizer}
    assert sorted(built({"train_batch_size": 1, **config}).explain().notes) == [
        "bf16.immediate_grad_update: no effect, gradients are always accumulated as they appear",
        "optimizer.legacy_fusion: no effect, updates always run over flat buckets",
    ]
    del config["bf16"]["immediate_grad_update"], optimizer["legacy_fusion"]
    assert list(built({"train_batch_size": 1, **config}).explain().notes) == []


def test_a_broken_check_of_a_plugin_names_the_plugin() -> None:
    class Broken(Plugin):
        name = "broken"

        @hookimpl
        def configure(self) -> Sequence[Problem]:
            raise KeyError("oops")

    with pytest.raises(KeyError) as caught:
        Plan.build(
            {"train_batch_size": 1, "plugins": {"broken": True}},
            registry=REGISTRY.with_plugins(Broken),
        )
    assert caught.value.__notes__ == [
        "raised by plugin 'broken' (test_plan in-process) in hook 'configure'"
    ]


def test_two_plugins_of_one_name_cannot_be_in_one_plan() -> None:
    class Twin(Plugin):
        name = "tensor"
        sections: ClassVar[Sections] = {"twin": Tensor}

    registry = Registry(core_entries()).with_plugins(TensorPlugin)
    registry.add("plugins", "twin", Twin)
    with pytest.raises(PluginError, match="two plugins are named 'tensor'"):
        Plan.build({"train_batch_size": 1, "tensor": {}, "twin": {}}, registry=registry)
