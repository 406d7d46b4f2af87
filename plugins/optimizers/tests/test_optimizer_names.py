"""The rules as a config names them: found in any case, every wrong parameter named by its path."""

from __future__ import annotations

import pytest
import torch
from drivetrain_optimizers import Lamb, Lion, Muon
from torch import nn

from drivetrain.communication.process_group import Ranks
from drivetrain.errors import ConfigError
from drivetrain.job.job import Job
from drivetrain.optimization.factory import make_rule
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry


@pytest.mark.parametrize(("name", "kind"), [("lion", Lion), ("LAMB", Lamb), ("Muon", Muon)])
def test_rules_are_found_in_any_case(name, kind):
    rule = make_rule(name, {"lr": 0.25, "betas": [0.8, 0.9]}, Registry.installed(), None)
    assert type(rule) is kind
    assert rule.defaults["lr"] == 0.25
    assert rule.defaults["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("Lion", {"wd": 1}, "optimizer.params.wd: unknown key"),
        (
            "Lamb",
            {"eps": 1, "lr": -2},
            "optimizer.params.lr: expected a number of at least 0, got -2",
        ),
        ("Muon", {"betas": [0.9, "b"]}, r"optimizer.params.betas\[1\]: expected a number"),
        (
            "Lamb",
            {"min_coeff": 5, "max_coeff": 3},
            "optimizer.params: max_coeff 3.0 is below min_coeff 5.0",
        ),
    ],
)
def test_a_wrong_parameter_is_named_by_its_path(name, params, message):
    with pytest.raises(ConfigError, match=message):
        make_rule(name, params, Registry.installed(), None)


@pytest.mark.parametrize("name", ["Lamb", "Lion", "Muon"])
def test_a_job_trains_with_what_its_config_names(name):
    config = {"train_batch_size": 8, "optimizer": {"type": name, "params": {"lr": 0.01}}}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    inputs = torch.randn(8, 4)
    targets = inputs.sum(dim=1, keepdim=True)
    with Job.open(Plan.build(config, world_size=1), Ranks(0, 1)) as job:
        engine = job.engine(model)
        assert engine.get_type() == name
        losses = []
        for _ in range(60):
            loss = nn.functional.mse_loss(engine(inputs), targets)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
