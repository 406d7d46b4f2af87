"""What a plan finds wrong in ``optimizer.params`` and ``scheduler.params``, before any torch.

The declared parameters are held against what they stand for: the same names, and whatever they let
pass can be made.
"""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drivetrain_kernels import rules
from drivetrain_onebit.adam import OneBitAdam
from drivetrain_onebit.lamb import OneBitLamb
from drivetrain_onebit.zero_one import ZeroOneAdam
from drivetrain_optimizers import Lamb, Lion, Muon
from drivetrain_optimizers.mup import MuAdam, MuAdamW, MuSGD

from drivetrain.contracts import Params
from drivetrain.errors import ConfigError
from drivetrain.optimization import schedules
from drivetrain.optimization.factory import make_rule
from drivetrain.optimization.schedule_choice import make_schedule
from drivetrain.plan.core_entries import ENTRIES
from drivetrain.plan.params import Kind, check_params, declared_params
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry
from drivetrain.sections import torch_params


def torch_models(kind: Kind) -> list[type[Params]]:
    """The models of torch's classes."""
    places = ENTRIES[f"{kind}_params"].items()
    return [getattr(torch_params, name) for name, place in places if "torch_params" in place]


REGISTRY = Registry.installed()

ADAM_FLAGS = {
    *("adam_w_mode", "torch_adam", "bias_correction", "set_grad_none", "fp32_optimizer_states"),
}

RULES: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch.optim, name) for name in ("Adam", "AdamW")},
    **{model.__name__: getattr(torch.optim, model.__name__) for model in torch_models("optimizer")},
    **{kind.__name__: kind for kind in (Lamb, Lion, MuAdam, MuAdamW, MuSGD, Muon)},
    **{
        kind.__name__: kind
        for kind in (
            *(rules.FusedAdam, rules.FusedAdagrad, rules.FusedLamb, rules.FusedLion),
            *(rules.FusedSGD,),
        )
    },
    "FusedAdamW": rules.FusedAdam,
    **{kind.__name__: kind for kind in (OneBitAdam, OneBitLamb, ZeroOneAdam)},
}
SCHEDULES: dict[str, Callable[..., Any]] = {
    **{entry.name: getattr(schedules, entry.name) for entry in REGISTRY.entries("schedulers")},
    **{
        model.__name__: getattr(torch.optim.lr_scheduler, model.__name__)
        for model in torch_models("scheduler")
    },
}
NEEDED: dict[str, dict[str, Any]] = {
    "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0},
    "WarmupDecayLR": {"total_num_steps": 9},
    "WarmupCosineLR": {"total_num_steps": 9},
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [1]},
    "ExponentialLR": {"gamma": 0.5},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 9},
}
VALUES: tuple[Any, ...] = (
    *(-1, 0, 1, 1e3, 10**30, math.nan, math.inf, "fast", True, None),
    *([], [1], [0.5, 0.75], [0.5, 1.5], [0.9, "b"], {}),
)


def model_of(kind: Kind, name: str) -> type[Params]:
    model = declared_params(REGISTRY, kind, name)
    assert model is not None, f"{name} declares no parameters"
    return model


def make_optimizer(name: str, params: dict[str, Any]) -> None:
    if name in ("OneBitAdam", "OneBitLamb", "ZeroOneAdam"):
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in params.items()}
        RULES[name](None, **given)
    else:
        make_rule(name, params, REGISTRY, None)


def make_and_step(name: str, params: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    schedule = make_schedule(name, params, optimizer, REGISTRY)
    arguments = (1.0,) if name == "ReduceLROnPlateau" else ()
    for _ in range(3):
        schedule.step(*arguments)


def test_every_optimizer_and_schedule_declares_its_parameters() -> None:
    names = {entry.name for entry in REGISTRY.entries("optimizers")}
    assert names <= RULES.keys()
    for name in RULES:
        model_of("optimizer", name)
    for name in SCHEDULES:
        model_of("scheduler", name)


@pytest.mark.parametrize("name", RULES)
def test_an_optimizers_parameters_have_the_names_that_it_has(name: str) -> None:
    declared = set(model_of("optimizer", name).model_fields)
    own = list(inspect.signature(RULES[name]).parameters)
    leading = {"params", "communicator"}
    extra = ADAM_FLAGS if name in ("Adam", "AdamW") else set()
    assert declared - extra == set(own) - leading


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedules_parameters_have_the_names_that_it_has(name: str) -> None:
    declared = set(model_of("scheduler", name).model_fields)
    assert declared == set(inspect.signature(SCHEDULES[name]).parameters) - {"optimizer"}


@pytest.mark.parametrize("kind", ["optimizer", "scheduler"])
def test_defaults_are_those_of_what_is_made(kind: Kind) -> None:
    for name, made in (RULES if kind == "optimizer" else SCHEDULES).items():
        fields = model_of(kind, name).model_fields
        for parameter, own in inspect.signature(made).parameters.items():
            # An optimizer of these names has no decay of weights unless it is asked for.
            if parameter not in fields or (name, parameter) == ("AdamW", "weight_decay"):
                continue
            if own.default is own.empty:
                assert fields[parameter].is_required(), (name, parameter)
            else:
                assert fields[parameter].default == own.default, (name, parameter)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["optimizer", "scheduler"])
def test_what_passes_the_check_can_be_made(kind: Kind) -> None:
    make = make_optimizer if kind == "optimizer" else make_and_step
    passed = 0
    for name in RULES if kind == "optimizer" else SCHEDULES:
        model = model_of(kind, name)
        for field in model.model_fields:
            for value in VALUES:
                params = {**NEEDED.get(name, {}), field: value}
                # How many groups there are, and how long training is, no config tells.
                if (isinstance(value, list) and field not in ("betas", "etas", "step_sizes")) or (
                    field in ("total_steps", "epochs", "steps_per_epoch")
                ):
                    continue
                try:
                    check_params(model, kind, params)
                except ConfigError:
                    continue
                make(name, params)  # must not raise
                passed += 1
    assert passed > 100


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, "fast", True, [0.1], None])
def test_no_optimizer_takes_such_a_rate(value: Any) -> None:
    for name in RULES:
        with pytest.raises(ConfigError, match=r"optimizer\.params\.lr: expected"):
            check_params(model_of("optimizer", name), "optimizer", {"lr": value})


def problems(config: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Plan.build({"train_batch_size": 1, **config}, world_size=1)
    return [problem.partition(" [")[0] for problem in caught.value.problems]


def test_a_plan_finds_every_wrong_parameter_at_once() -> None:
    optimizer = {"beta": [0.9, 0.99], "weight_decy": 0.1, "lr": "fast", "eps": math.nan}
    schedule = {"warmup_steps_num": 10, "warmup_type": "steep", "warmup_max_lr": -1}
    assert problems(
        {
            "optimizer": {"type": "AdamW", "params": optimizer},
            "scheduler": {"type": "WarmupLR", "params": schedule},
        }
    ) == [
        "optimizer.params.beta: unknown key; did you mean 'betas'?",
        "optimizer.params.weight_decy: unknown key; did you mean 'weight_decay'?",
        'optimizer.params.lr: expected a number, got "fast"',
        "optimizer.params.eps: expected a finite number, got NaN",
        "scheduler.params.warmup_steps_num: unknown key; did you mean 'warmup_num_steps'?",
        "scheduler.params.warmup_type: expected 'log' or 'linear', got \"steep\"",
        "scheduler.params.warmup_max_lr: expected a number of at least 0 or a list, got -1",
    ]


@pytest.mark.parametrize("kind", ["LBFGS", "SparseAdam", "Adafactor", "lbfgs"])
def test_an_optimizer_that_no_flat_bucket_can_use_is_refused(kind: str) -> None:
    (problem,) = problems({"optimizer": {"type": kind}})
    assert problem.startswith(f"optimizer.type: {kind} updates no flat buckets")


@pytest.mark.parametrize(
    "kind", ["LambdaLR", "MultiplicativeLR", "ChainedScheduler", "sequentiallr"]
)
def test_a_schedule_that_no_config_can_describe_is_refused(kind: str) -> None:
    (problem,) = problems({"scheduler": {"type": kind}})
    assert problem.startswith(f"scheduler.type: {kind} needs")


def test_a_cycle_of_momenta_needs_an_optimizer_that_has_one() -> None:
    cycle = {"type": "OneCycleLR", "params": {"max_lr": 1, "total_steps": 9}}
    (problem,) = problems({"optimizer": {"type": "Adagrad"}, "scheduler": cycle})
    assert problem.startswith("scheduler.params.cycle_momentum: Adagrad has no momentum")
    cycle["params"] |= {"cycle_momentum": False}
    Plan.build({"train_batch_size": 1, "optimizer": {"type": "Adagrad"}, "scheduler": cycle})
    Plan.build({"train_batch_size": 1, "optimizer": {"type": "Lion"}, "scheduler": cycle})


def test_whole_numbers_in_any_notation_reach_what_is_made() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    # torch takes no float for a number of steps
    schedule = make_schedule("OneCycleLR", {"max_lr": 1, "total_steps": 1e2}, optimizer, REGISTRY)
    assert schedule.total_steps == 100


def test_checking_imports_no_torch() -> None:
    code = """
import sys
from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry
for kind in ("optimizer", "scheduler"):
    names = Registry.installed().names(kind + "s")
    for name in [*names, "SGD", "StepLR"]:
        try:
            Plan.build({"train_batch_size": 1, kind: {"type": name, "params": {"nonsense": 1}}})
        except ConfigError as error:
            assert "nonsense: unknown key" in str(error) or "no " + kind in str(error), error
        else:
            raise AssertionError(name)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
