"""The fused rules against torch's optimizers, through the buckets that core hands to rules."""

from __future__ import annotations

import pytest
import torch
from drivetrain_kernels import rules
from drivetrain_kernels.report import report_rows

from drivetrain.contracts import BucketSpec, Segment
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.states.device_home import DeviceHome

CPU = torch.device("cpu")
COUNT = 40


def make_home(rule, parameter=torch.float32, master=torch.float32, segments=None):
    spec = BucketSpec(
        key="bucket0",
        numel=COUNT,
        segments=segments or (Segment("weight", (COUNT,), 0, COUNT, 0),),
        parameter_dtype=parameter,
        gradient_dtype=parameter,
        master_dtype=master,
        state_dtype=torch.float32,
        reduction="data",
        rule=rule,
        group=0,
        device=CPU,
    )
    home = DeviceHome(spec)
    originals = torch.linspace(-1, 1, COUNT)
    parameters = originals.to(parameter)
    home.adopt(parameters, originals)
    return home, parameters


def gradients(steps=6):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(COUNT, generator=generator) for _ in range(steps)]


def run(home, rule, **changes):
    for gradient in gradients():
        home.update(gradient.to(home.spec.gradient_dtype), {**rule.defaults, **changes}, 1.0)


def torch_run(kind, **options):
    weights = torch.linspace(-1, 1, COUNT, dtype=torch.float64).requires_grad_()
    optimizer = kind([weights], **options)
    for gradient in gradients():
        weights.grad = gradient.double()
        optimizer.step()
    return weights.detach().float()


@pytest.mark.parametrize(
    ("factory", "params", "kind", "options"),
    [
        (rules.fused_adamw, {"weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1}),
        (
            rules.fused_adam,
            {"adam_w_mode": False, "weight_decay": 0.1, "betas": [0.8, 0.9]},
            torch.optim.Adam,
            {"weight_decay": 0.1, "betas": (0.8, 0.9)},
        ),
        (rules.fused_adagrad, {"weight_decay": 0.1}, torch.optim.Adagrad, {"weight_decay": 0.1}),
        (
            rules.fused_sgd,
            {"momentum": 0.9, "nesterov": True},
            torch.optim.SGD,
            {"momentum": 0.9, "nesterov": True},
        ),
        (
            rules.fused_sgd,
            {"momentum": 0.9, "dampening": 0.4},
            torch.optim.SGD,
            {"momentum": 0.9, "dampening": 0.4},
        ),
        (rules.fused_sgd, {}, torch.optim.SGD, {}),
    ],
    ids=["adamw", "adam", "adagrad", "sgd with momentum", "sgd with dampening", "sgd"],
)
def test_a_fused_rule_trains_like_torch(factory, params, kind, options):
    rule = factory({"lr": 0.05, **params}, None)
    home, parameters = make_home(rule)
    run(home, rule)
    expected = torch_run(kind, lr=0.05, **options)
    torch.testing.assert_close(parameters, expected, rtol=1e-5, atol=1e-6)


def test_a_schedule_changes_the_learning_rate_of_the_next_step():
    rule = rules.fused_sgd({"lr": 1.0}, None)
    home, parameters = make_home(rule)
    before = parameters.clone()
    home.update(torch.ones(COUNT), {**rule.defaults, "lr": 0.25}, 2.0)
    torch.testing.assert_close(parameters, before - 0.5)


def test_parameters_in_bfloat16_follow_their_masters():
    rule = rules.fused_adamw({"lr": 0.05}, None)
    home, parameters = make_home(rule, torch.bfloat16)
    run(home, rule)
    masters = home.states.tensors["master"]
    assert masters.dtype == torch.float32
    assert torch.equal(parameters, masters.bfloat16())


def test_states_may_be_kept_in_bfloat16():
    rule = rules.fused_adamw({"lr": 0.05, "state_dtype": "bf16"}, None)
    home, parameters = make_home(rule)
    run(home, rule)
    assert {state.dtype for state in home.states.tensors.values()} == {torch.bfloat16}
    expected = torch_run(torch.optim.AdamW, lr=0.05, weight_decay=0.0)
    torch.testing.assert_close(parameters, expected, rtol=0, atol=0.02)


def test_stochastic_rounding_keeps_updates_that_rounding_to_nearest_loses():
    # A step of 1e-3 on weights of 1 is a quarter of bfloat16's half unit there.
    moved = {}
    for stochastic in (False, True):
        rule = rules.fused_sgd({"lr": 1e-3, "stochastic_rounding": stochastic}, None)
        home, parameters = make_home(rule, torch.bfloat16, torch.bfloat16)
        parameters.fill_(1.0)
        for _ in range(200):
            home.update(torch.ones(COUNT, dtype=torch.bfloat16), rule.defaults, 1.0)
        moved[stochastic] = 1 - float(parameters.float().mean())
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(0.2, rel=0.1)


def test_copies_of_a_bucket_round_alike():
    results = []
    for _ in range(2):
        rule = rules.fused_adamw({"lr": 0.01, "stochastic_rounding": True}, None)
        home, parameters = make_home(rule, torch.bfloat16, torch.bfloat16)
        run(home, rule)
        results.append(parameters)
    assert torch.equal(*results)


def test_lamb_gives_every_tensor_its_ratio():
    segments = (Segment("a", (16,), 0, 16, 0), Segment("b", (4, 5), 0, 20, 16))
    rule = rules.fused_lamb({"lr": 0.1, "eps": 0.0, "min_coeff": 0.0}, None)
    home, parameters = make_home(rule, segments=segments)
    parameters.fill_(0.5)
    home.update(torch.ones(COUNT), rule.defaults, 1.0)
    # Without bias correction u = 0.1 / sqrt(0.001) everywhere, so |w| / |u| = 0.5 / 3.1623.
    step = 0.1 * (0.5 / 3.16227766) * 3.16227766
    torch.testing.assert_close(parameters[:36], torch.full((36,), 0.5 - step))


def test_lion_starts_with_the_sign_of_the_gradient():
    rule = rules.fused_lion({"lr": 0.1}, None)
    home, parameters = make_home(rule)
    before, (gradient, *_) = parameters.clone(), gradients()
    home.update(gradient, rule.defaults, 1.0)
    torch.testing.assert_close(parameters, before - 0.1 * gradient.sign())


def test_wrong_parameters_are_named_by_their_config_path():
    with pytest.raises(ConfigError, match=r"params\.weight_decai: FusedAdam has no such"):
        rules.fused_adamw({"weight_decai": 0.1}, None)
    with pytest.raises(ConfigError, match=r"must be one of fp32, bf16, fp16, got 'int8'"):
        rules.fused_adamw({"state_dtype": "int8"}, None)
    with pytest.raises(ConfigError, match="nesterov needs momentum"):
        rules.fused_sgd({"nesterov": True}, None)


def test_weights_that_kernels_do_not_store_are_refused():
    rule = rules.fused_sgd({}, None)
    home, _ = make_home(rule, torch.float64, torch.float64)
    with pytest.raises(TrainingError, match=r"bucket bucket0: fused rules keep weights in float32"):
        home.update(torch.ones(COUNT, dtype=torch.float64), rule.defaults, 1.0)


def test_the_report_tells_what_runs():
    rows = report_rows("cpu")
    text = " ".join(value for _, value in rows)
    assert all(name in text for name in ("adam", "quantize", "norm_squared"))
    assert all(label.startswith("kernels for cpu: ") for label, _ in rows)
