"""Muon against its formulas in float64, and which parameters it takes."""

from __future__ import annotations

import pytest
import torch
from drivetrain_optimizers import Muon
from drivetrain_optimizers.muon import newton_schulz, newton_schulz_gram
from torch import nn

from drivetrain.contracts import ParameterTable
from drivetrain.errors import ConfigError
from drivetrain.testing.rules import place, read

SHAPES = {"tall": (9, 4), "wide": (3, 8), "square": (5, 5), "kernel": (4, 3, 2, 2), "row": (1, 6)}


def numbers(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def orthogonalised(m, steps):
    """The quintic applied to singular values, which needs no matrix products at all."""
    u, s, vh = torch.linalg.svd(m.flatten(1), full_matrices=False)
    s = s / m.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u @ torch.diag(s) @ vh).view(m.shape)


def muon(p, m, g, hyper):
    beta = hyper["momentum"]
    m = beta * m + (1 - beta) * g
    update = beta * m + (1 - beta) * g if hyper["nesterov"] else m
    rows, columns = p.flatten(1).shape
    update = orthogonalised(update, hyper["ns_steps"]) * max(1, rows / columns) ** 0.5
    return p * (1 - hyper["lr"] * hyper["weight_decay"]) - hyper["lr"] * update, m


@pytest.mark.parametrize("scale", [1.0, torch.tensor(0.25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"nesterov": False, "weight_decay": 0.1, "momentum": 0.5},
        {"ns_steps": 1},
        {"ns_steps": 2},
        {"ns_steps": 7},
    ],
)
def test_five_steps_equal_the_formulas(params, method, dtype, scale):
    rule = Muon(lr=0.05, ns_method=method, **params)
    start = numbers(0, dtype)
    home, flat, flatten = place(rule, start)
    weights = {name: value.double() for name, value in start.items()}
    momenta = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step in range(5):
        gradients = numbers(step + 1, dtype)
        for name, gradient in gradients.items():
            weights[name], momenta[name] = muon(
                weights[name], momenta[name], gradient.double() * float(scale), rule.defaults
            )
        home.update(flatten(gradients), rule.defaults, scale)
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9
    for name, values in read(home, flat).items():
        torch.testing.assert_close(
            values.double(), weights[name], rtol=tolerance, atol=tolerance / 10
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_both_methods_stay_near_orthogonal(dtype):
    matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    matrix /= matrix.norm()
    iterate = newton_schulz_gram if dtype == torch.float16 else newton_schulz
    values = torch.linalg.svdvals(iterate(matrix.to(dtype), 5).float())
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_gradient_of_zero_changes_nothing():
    rule = Muon()
    home, flat, flatten = place(rule, {"w": torch.ones(3, 3)})
    home.update(flatten({"w": torch.zeros(3, 3)}), rule.defaults, 1.0)
    assert torch.equal(flat[:9], torch.ones(9))


def test_low_precision_parameters_are_rounded_masters():
    rule = Muon()
    home, flat, flatten = place(rule, numbers(0, torch.float32), parameter_dtype=torch.bfloat16)
    home.update(flatten(numbers(1, torch.float32)), rule.defaults, 1.0)
    assert torch.equal(flat, home.states.tensors["master"].bfloat16())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.lm_head = nn.Linear(4, 5, bias=False)


def chosen(rule, model):
    table = ParameterTable()
    table.register(model, ("dp",))
    return {
        name
        for name, parameter in model.named_parameters()
        if rule.rule_for(parameter, table.info(parameter)) is rule
    }


def test_matrices_but_embeddings_and_the_head_get_muon():
    assert chosen(Muon(), Model()) == {"hidden.weight", "conv.weight"}


def test_the_attribute_use_muon_decides():
    model = Model()
    model.hidden.weight.use_muon = False
    model.lm_head.weight.use_muon = True
    assert chosen(Muon(), model) == {"conv.weight", "lm_head.weight"}


def test_use_muon_on_a_vector_is_refused_by_name():
    model = Model()
    model.hidden.bias.use_muon = True
    with pytest.raises(ConfigError, match=r"hidden.bias has use_muon set, but its shape \(4,\)"):
        chosen(Muon(), model)


def auxiliary(rule):
    table = ParameterTable()
    model = nn.Linear(2, 2)
    table.register(model, ("dp",))
    return rule.rule_for(model.bias, table.info(model.bias))


def test_other_parameters_get_adamw_whose_rate_follows_the_schedule():
    rule = Muon(lr=0.02, weight_decay=0.1)
    start = torch.randn(6, dtype=torch.float64)
    home, flat, flatten = place(auxiliary(rule), {"b": start})
    parameter = nn.Parameter(start.clone())
    reference = torch.optim.AdamW(
        [parameter], lr=3e-4, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1
    )
    hyper = dict(rule.defaults)
    for share in (1.0, 0.5, 0.25):
        hyper["lr"] = 0.02 * share
        reference.param_groups[0]["lr"] = 3e-4 * share
        # Another one each time: under a constant gradient Adam's betas cancel out.
        gradient = torch.randn(6, dtype=torch.float64)
        parameter.grad = gradient * 0.5
        reference.step()
        home.update(flatten({"b": gradient}), hyper, 0.5)
    torch.testing.assert_close(flat[:6], parameter.detach(), rtol=1e-12, atol=1e-14)


def test_muon_lr_overrides_lr():
    assert Muon(lr=0.1, muon_lr=0.3).defaults["lr"] == 0.3


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"ns_steps": 0}, "ns_steps must be at least 1, got 0"),
        ({"ns_method": "svd"}, "ns_method must be 'standard' or 'gram', got 'svd'"),
        ({"adam_lr": -1.0}, "adam_lr must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        Muon(**params)
