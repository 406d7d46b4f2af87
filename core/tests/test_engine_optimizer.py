"""The optimizer that users hold is a torch optimizer in every way that frameworks check."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from drivetrain.errors import ConfigError, TrainingError
from drivetrain.optimization.facade import EngineOptimizer
from drivetrain.optimization.factory import rule_from_optimizer


class Calls(list):
    """What the facade asked the engine for."""

    def step(self):
        self.append("step")

    def zero_grad(self, set_to_none):
        self.append(f"zero_grad {set_to_none}")


def model():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def names(module):
    return {parameter: name for name, parameter in module.named_parameters()}


def facade(module, groups=None, calls=None):
    calls = Calls() if calls is None else calls
    groups = groups or [{"params": list(module.parameters()), "lr": 0.5, "betas": (0.9, 0.99)}]
    return EngineOptimizer(
        groups,
        names(module),
        step=calls.step,
        zero_grad=calls.zero_grad,
        type_name="AdamW",
    )


def test_step_and_zero_grad_are_the_engines():
    calls = Calls()
    optimizer = facade(model(), calls=calls)
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.zero_grad(set_to_none=False)
    assert calls == ["step", "zero_grad True", "zero_grad False"]


def test_a_closure_runs_with_gradients_before_the_step():
    calls = Calls()
    optimizer = facade(model(), calls=calls)

    @torch.no_grad()
    def train():
        def closure():
            calls.append(f"closure {torch.is_grad_enabled()}")
            return 7

        return optimizer.step(closure)

    assert train() == 7
    assert calls == ["closure True", "step"]


def test_groups_are_the_very_dicts_that_rules_read():
    module = model()
    client = torch.optim.AdamW(module.parameters(), lr=0.25)
    plan = rule_from_optimizer(client)
    optimizer = facade(module, plan.groups)
    optimizer.param_groups[0]["lr"] = 0.125
    assert client.param_groups[0]["lr"] == plan.groups[0]["lr"] == 0.125


def test_torchs_schedules_run_on_it():
    optimizer = facade(model())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_step_hooks_of_torch_run():
    calls = Calls()
    optimizer = facade(model(), calls=calls)
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
    optimizer.step()
    assert calls == ["step", "hook"]


def test_state_dict_holds_hyper_parameters_and_loads_into_the_same_dicts():
    optimizer = facade(model())
    group = optimizer.param_groups[0]
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"] == {}
    assert saved["param_groups"] == [
        {"lr": 0.5, "betas": (0.9, 0.99), "params": [0, 1, 2, 3]},
    ]
    group.update(lr=9.0, betas=(0, 0))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0] is group
    assert group["lr"] == 0.5
    assert group["betas"] == (0.9, 0.99)
    assert isinstance(group["params"][0], nn.Parameter)


def test_what_is_not_loaded_is_said_or_refused(caplog):
    module = model()
    optimizer = facade(module)
    optimizer.load_state_dict(optimizer.state_dict())
    assert [r.getMessage() for r in caplog.records] == [
        "only hyper-parameters were loaded; states come back with engine.load_checkpoint()"
    ]
    plain = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    plain.step()
    with pytest.raises(
        ConfigError, match=r"states are loaded by engine\.load_checkpoint\(\) alone"
    ):
        optimizer.load_state_dict(plain.state_dict())


def test_a_state_of_other_groups_is_refused():
    module = model()
    optimizer = facade(module)
    other = facade(module, [{"params": [p], "lr": 1.0} for p in module.parameters()]).state_dict()
    with pytest.raises(ConfigError, match=r"4 groups of \[1, 1, 1, 1\].* has 1 of \[4\]"):
        optimizer.load_state_dict(other)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_groups_cannot_be_added_once_states_are_placed():
    optimizer = facade(model())
    with pytest.raises(TrainingError, match="cannot be added after initialize"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_a_parameter_in_two_groups_is_refused_by_name():
    module = model()
    groups = [{"params": list(module.parameters())}, {"params": [module[1].weight]}]
    with pytest.raises(ConfigError, match=r"1\.weight is in optimizer group 0 and again in .* 1"):
        facade(module, groups)


def test_a_parameter_twice_in_a_group_is_refused():
    module = model()
    with pytest.raises(ConfigError, match=r"0\.bias is in optimizer group 0 and again in group 0"):
        facade(module, [{"params": [module[0].bias, module[0].bias]}])


def test_parameters_of_another_model_are_all_refused_at_once():
    module, other = model(), model()
    with pytest.raises(ConfigError) as caught:
        facade(module, [{"params": list(other.parameters())}])
    assert len(caught.value.problems) == 4
    assert "parameter 0 of optimizer group 0, shape (3, 2), is not the model's" in str(caught.value)


def test_a_model_without_trainable_parameters_is_refused():
    frozen = model().requires_grad_(False)
    with pytest.raises(
        ConfigError, match="no trainable parameters: all 4 have requires_grad=False"
    ):
        facade(frozen)
    with pytest.raises(ConfigError, match=r"no trainable parameters$"):
        facade(nn.ReLU(), [{"params": []}])


def test_an_optimizer_of_frozen_parameters_only_is_refused():
    module = model()
    module[0].requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter of the optimizer is trainable"):
        facade(module, [{"params": list(module[0].parameters())}])


def test_errors_travel_between_processes():
    with pytest.raises(ConfigError) as caught:
        facade(nn.ReLU(), [{"params": []}])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
