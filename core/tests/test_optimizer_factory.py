"""Which rule a config's optimizer section makes, and what is wrong with a wrong one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from drivetrain.contracts import NonNegativeFloat, OptimizerParams, Share, UpdateRule
from drivetrain.errors import ConfigError, PluginError
from drivetrain.optimization.factory import make_rule, optimizer_plan
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry
from drivetrain.testing.rules import place


@pytest.fixture
def registry():
    return Registry.installed()


def after_steps(rule, steps=5):
    """Weights after some steps from fixed numbers, in float64."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20, generator=generator, dtype=torch.float64)
    home, flat, flatten = place(rule, {"w": start})
    for _ in range(steps):
        gradient = torch.randn(20, generator=generator, dtype=torch.float64)
        home.update(flatten({"w": gradient}), rule.defaults, 1.0)
    return flat[:20]


def reference(kind, steps=5, **params):
    generator = torch.Generator().manual_seed(0)
    weights = nn.Parameter(torch.randn(20, generator=generator, dtype=torch.float64))
    optimizer = kind([weights], **params)
    for _ in range(steps):
        weights.grad = torch.randn(20, generator=generator, dtype=torch.float64)
        optimizer.step()
    return weights.detach()


@pytest.mark.parametrize(
    ("name", "params", "kind", "meant"),
    [
        ("Adam", {}, torch.optim.AdamW, {"weight_decay": 0.0}),
        ("adam", {"weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1}),
        (
            "Adam",
            {"adam_w_mode": False, "weight_decay": 0.1},
            torch.optim.Adam,
            {"weight_decay": 0.1},
        ),
        ("AdamW", {}, torch.optim.AdamW, {"weight_decay": 0.0}),
        (
            "ADAMW",
            {"adam_w_mode": False, "weight_decay": 0.1},
            torch.optim.AdamW,
            {"weight_decay": 0.1},
        ),
        ("AdamW", {"torch_adam": True}, torch.optim.AdamW, {}),
        (
            "Adam",
            {"torch_adam": True, "adam_w_mode": False, "amsgrad": True},
            torch.optim.Adam,
            {"amsgrad": True},
        ),
        (
            "NAdam",
            {"betas": [0.8, 0.9]},
            torch.optim.NAdam,
            {"betas": (0.8, 0.9)},
        ),
        ("sgd", {"lr": 0.1, "momentum": 0.9}, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        ("Adagrad", {}, torch.optim.Adagrad, {}),
        ("RMSprop", {"centered": True}, torch.optim.RMSprop, {"centered": True}),
        ("nadam", {}, torch.optim.NAdam, {}),
    ],
)
def test_a_name_trains_like_the_torch_class_it_stands_for(registry, name, params, kind, meant):
    rule = make_rule(name, params, registry, None)
    expected = reference(kind, **meant)
    torch.testing.assert_close(after_steps(rule), expected, rtol=1e-12, atol=1e-14)


def test_adam_accepts_what_configs_of_the_fused_kernels_contain(registry):
    params = {"bias_correction": False, "set_grad_none": True, "fp32_optimizer_states": True}
    rule = make_rule("Adam", params, registry, None)
    assert [state.dtype for state in rule.states(None)] == [torch.float32] * 2
    generator = torch.Generator().manual_seed(0)
    weights, mean, square = torch.randn(20, generator=generator, dtype=torch.float64), 0.0, 0.0
    for _ in range(5):
        gradient = torch.randn(20, generator=generator, dtype=torch.float64)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        weights = weights - 1e-3 * mean / (square.sqrt() + 1e-8)
    torch.testing.assert_close(after_steps(rule), weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("AdamWW", {}, "optimizer.type: no optimizer is named 'AdamWW'; did you mean 'AdamW'"),
        ("Optimizer", {}, "optimizer.type: no optimizer is named 'Optimizer'"),
        ("LBFGS", {}, "optimizer.type: .*LBFGS cannot update flat parts.*closure"),
        ("adafactor", {}, "optimizer.type: .*Adafactor is not elementwise"),
        ("SparseAdam", {}, "optimizer.type: .*SparseAdam cannot update flat parts"),
        ("Adam", {"learning_rate": 1}, "optimizer.params.learning_rate: unknown key"),
        ("Adam", {"weight_deca": 1}, "did you mean 'weight_decay'"),
        ("Adam", {"lr": -1}, "optimizer.params.lr: expected a number of at least 0, got -1"),
        ("Adam", {"lr": "1e-3"}, 'optimizer.params.lr: expected a number, got "1e-3"'),
        (
            "SGD",
            {"lr": float("inf")},
            "optimizer.params.lr: expected a finite number, got Infinity",
        ),
        (
            "SGD",
            {"momentum": True},
            "optimizer.params.momentum: expected a number, got true",
        ),
        ("Adam", {"amsgrad": 1}, "optimizer.params.amsgrad: expected true or false, got 1"),
        ("Adam", {"adam_w_mode": 1}, "optimizer.params.adam_w_mode: expected true or false"),
        (
            "Adam",
            {"betas": [0.9]},
            r"optimizer.params.betas: expected a list of 2 numbers, got \[0.9\]",
        ),
        ("Adam", {"betas": [0.9, "b"]}, r"optimizer.params.betas\[1\]: expected a number"),
        (
            "SGD",
            {"nesterov": True},
            "optimizer.params: nesterov needs momentum and no dampening",
        ),
    ],
)
def test_a_wrong_optimizer_section_names_the_path(registry, name, params, message):
    with pytest.raises(ConfigError, match=message):
        make_rule(name, params, registry, None)


def test_all_wrong_parameters_are_reported_at_once(registry):
    with pytest.raises(ConfigError) as caught:
        make_rule("AdamW", {"foo": 1, "bar": 2, "lr": "x"}, registry, None)
    assert len(caught.value.problems) == 3


class Halving(UpdateRule):
    defaults = {"lr": 0.5}

    def states(self, bucket):
        return []

    def update(self, bucket, hyper, scale):
        bucket.weights.mul_(hyper["lr"])


def test_a_plugins_factory_gets_the_params_and_the_job(registry):
    seen = []

    def factory(params, job):
        seen.append((params, job))
        return Halving()

    registry.add("optimizers", "Halving", factory)
    rule = make_rule("halving", {"a": 1}, registry, "the job")
    assert isinstance(rule, Halving)
    assert seen == [({"a": 1}, "the job")]


class Between(Halving):
    """A rule whose keyword arguments are the config's parameters."""

    def __init__(self, lr=0.5, *, low=0.0, high=1.0, betas=(0.9, 0.99)):
        if lr < 0:
            raise ValueError("lr must be at least 0")
        if low > high:
            raise ValueError("low is above high")
        self.defaults = {"lr": lr, "betas": betas}


@pytest.fixture
def between(registry):
    registry.add("optimizers", "Between", Between)
    return registry


@pytest.mark.parametrize("name", ["Between", "between", "BETWEEN"])
def test_a_plugins_rule_gets_the_params_as_keywords(between, name):
    rule = make_rule(name, {"lr": 0.25, "betas": [0.8, 0.9]}, between, None)
    assert type(rule) is Between
    assert rule.defaults == {"lr": 0.25, "betas": (0.8, 0.9)}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"wd": 1}, "optimizer.params.wd: Between has no such parameter"),
        ({"low": 0.5, "lr": -2}, "optimizer.params.lr: Between refuses -2: lr must be at least 0"),
        ({"low": 0.8, "high": 0.5}, r'optimizer.params: Between refuses {"low": 0.8, "high": 0.5}'),
    ],
)
def test_what_a_plugins_rule_refuses_is_named(between, params, message):
    with pytest.raises(ConfigError, match=message):
        make_rule("Between", params, between, None)


def test_a_plugin_that_makes_no_rule_is_named(registry):
    registry.add("optimizers", "Broken", lambda params, job: 3)
    with pytest.raises(PluginError, match=r"'Broken'.* made a int, not an UpdateRule"):
        make_rule("Broken", {}, registry, None)


def test_groups_stay_the_clients_dicts_and_get_what_they_lack(registry):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [
        {"params": model[0].parameters(), "lr": 0.5},
        {"params": model[1].weight},
    ]
    plan = optimizer_plan("AdamW", {"lr": 0.1, "weight_decay": 0.3}, groups, registry, None)
    assert all(mine is given for mine, given in zip(plan.groups, groups, strict=True))
    assert [group["lr"] for group in plan.groups] == [0.5, 0.1]
    assert [group["weight_decay"] for group in plan.groups] == [0.3, 0.3]
    assert plan.groups[0]["params"] == list(model[0].parameters())
    assert plan.groups[1]["params"] == [model[1].weight]


@pytest.mark.parametrize("named", [False, True])
def test_plain_and_named_parameters_make_one_group(registry, named):
    model = nn.Linear(2, 2)
    given = model.named_parameters() if named else model.parameters()
    (group,) = optimizer_plan("SGD", {}, given, registry, None).groups
    assert group["params"] == [model.weight, model.bias]
    assert group.get("param_names") == (["weight", "bias"] if named else None)


def plan_problems(registry, kind, name, params):
    with pytest.raises(ConfigError) as caught:
        Plan.build(
            {"train_batch_size": 1, kind: {"type": name, "params": params}},
            world_size=1,
            registry=registry,
        )
    return caught.value.problems


def test_a_plan_checks_a_rule_that_declares_nothing_by_its_signature(between):
    problems = plan_problems(between, "optimizer", "between", {"wd": 1, "lr": "x", "foo": "auto"})
    assert [problem.partition(":")[0] for problem in problems] == [
        "optimizer.params.wd",
        "optimizer.params.lr",
        "optimizer.params.foo",
    ]


def test_a_plan_checks_a_schedule_that_declares_nothing_by_its_signature(registry):
    class Halving:
        def __init__(self, optimizer, every=1): ...

    registry.add("schedulers", "Halving", Halving)
    (problem,) = plan_problems(registry, "scheduler", "Halving", {"evry": 2})
    assert problem.startswith("scheduler.params.evry: Halving has no such parameter; did you mean")


class BetweenParams(OptimizerParams):
    lr: NonNegativeFloat = 0.5
    low: Share = 0.0


def test_a_plugin_declares_what_its_rule_takes(between):
    between.add("optimizer_params", "BETWEEN", BetweenParams)
    assert sorted(plan_problems(between, "optimizer", "between", {"low": 1, "wd": 3})) == [
        "optimizer.params.low: expected a number below 1, got 1 [between]",
        "optimizer.params.wd: unknown key [between]",
    ]
    assert make_rule("Between", {"low": 0.5}, between, None).defaults["lr"] == 0.5


def test_what_declares_parameters_must_be_a_model_of_them(between):
    between.add("optimizer_params", "Between", dict)
    with pytest.raises(PluginError, match="not a subclass of Params"):
        make_rule("Between", {}, between, None)


def test_a_package_that_takes_a_name_of_core_speaks_for_itself(registry):
    registry.add("optimizers", "Adam", Between)  # which core declares parameters for, too
    assert make_rule("Adam", {"low": 0.25}, registry, None).defaults["lr"] == 0.5
    (problem,) = plan_problems(registry, "optimizer", "Adam", {"eps": 1e-8})
    assert problem.startswith("optimizer.params.eps: Between has no such parameter")
