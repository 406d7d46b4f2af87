"""Adam as configs name it: the fused kernel where dtypes differ, torch's own where they do not."""

from __future__ import annotations

import pytest
import torch
from drivetrain_kernels import adam_rule

from drivetrain.contracts import BucketSpec, Segment
from drivetrain.optimization import factory
from drivetrain.plan.registry import Registry
from drivetrain.states.device_home import DeviceHome

COUNT = 1000
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def passes(monkeypatch):
    """Buckets that went through the kernel, which counts as native here."""
    found = []
    real = adam_rule.adam_in_one_pass

    def count(weights, *arguments, **options):
        found.append(weights.dtype)
        real(weights, *arguments, **options)

    monkeypatch.setattr(adam_rule, "adam_in_one_pass", count)
    monkeypatch.setattr(adam_rule, "_is_native", lambda device_type: True)
    return found


def train(rule, parameter, gradient, master=FP32, steps=5, **changes):
    """Parameters, masters and states after some steps with ``gradient * 0.5``."""
    spec = BucketSpec(
        key="bucket0",
        numel=COUNT,
        segments=(Segment("weight", (COUNT,), 0, COUNT, 0),),
        parameter_dtype=parameter,
        gradient_dtype=gradient,
        master_dtype=master,
        state_dtype=master,
        reduction="data",
        rule=rule,
        group=0,
        device=torch.device("cpu"),
    )
    home = DeviceHome(spec)
    originals = torch.linspace(-1, 1, COUNT, dtype=master)
    parameters = originals.to(parameter, copy=True)
    home.adopt(parameters, originals)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        values = torch.randn(COUNT, generator=generator).to(gradient)
        home.update(values, {**rule.defaults, **changes}, 0.5)
    states = dict(home.states.tensors)
    return [parameters, states.pop("master", parameters), *states.values()]


def reference(kind, gradient, steps=5, **options):
    weights = torch.linspace(-1, 1, COUNT).double().requires_grad_()
    optimizer = kind([weights], **options)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        weights.grad = torch.randn(COUNT, generator=generator).to(gradient).double() * 0.5
        optimizer.step()
    return weights.detach().float()


@pytest.mark.parametrize(
    ("factory_name", "params", "kind", "options"),
    [
        ("adamw", {"weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1}),
        ("adam", {"adam_w_mode": False}, torch.optim.Adam, {}),
        (
            "adam",
            {"betas": [0.8, 0.9]},
            torch.optim.AdamW,
            {"betas": (0.8, 0.9), "weight_decay": 0},
        ),
    ],
)
@pytest.mark.parametrize("gradient", [FP32, BF16])
def test_masters_of_low_precision_parameters_are_updated_in_one_pass(
    passes, factory_name, params, kind, options, gradient
):
    rule = getattr(adam_rule, factory_name)({"lr": 0.05, **params}, None)
    parameters, masters, *_ = train(rule, BF16, gradient)
    assert passes == [FP32] * 5
    expected = reference(kind, gradient, lr=0.05, **options)
    torch.testing.assert_close(masters, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(parameters, masters.bfloat16())


def test_no_bias_correction_is_none_in_the_kernel_either(passes):
    params = {"lr": 0.05, "bias_correction": False}
    found = train(adam_rule.adam(params, None), BF16, BF16)
    expected = train(factory.adam(params, None), BF16, BF16)
    assert passes
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, check_dtype=True)


@pytest.mark.parametrize(
    ("params", "changes", "dtypes"),
    [
        ({}, {}, (FP32, FP32, FP32)),
        ({}, {}, (torch.float64, torch.float64, torch.float64)),
        ({}, {}, (FP32, FP32, torch.float64)),
        ({"torch_adam": True}, {}, (BF16, BF16, FP32)),
        ({"amsgrad": True}, {}, (BF16, BF16, FP32)),
        ({"maximize": True}, {}, (BF16, BF16, FP32)),
        ({"fused": False}, {}, (BF16, BF16, FP32)),
        ({}, {"lr": torch.tensor(0.05)}, (BF16, BF16, FP32)),
    ],
)
def test_everything_else_has_the_bits_of_cores_rule(passes, params, changes, dtypes):
    params = {"lr": 0.05, **params}
    found = train(adam_rule.adamw(params, None), *dtypes, **changes)
    expected = train(factory.adamw(params, None), *dtypes, **changes)
    assert passes == []
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_without_a_native_kernel_torch_is_faster_and_runs(passes, monkeypatch):
    monkeypatch.setattr(adam_rule, "_is_native", lambda device_type: False)
    train(adam_rule.adam({}, None), BF16, BF16)
    assert passes == []


def test_a_config_that_names_adam_gets_it():
    installed = Registry.installed()
    for name in ("Adam", "AdamW", "adamw"):
        assert installed.find("optimizers", name).distribution == "drivetrain-kernels"
    chosen = installed.choosing({"optimizers.AdamW": "drivetrain"})
    assert chosen.find("optimizers", "AdamW").load() is factory.adamw
