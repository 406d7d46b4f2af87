"""The ratio of kept layers follows its formula, and reaches models that can use it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_progressive_layer_drop import ProgressiveLayerDrop, current_theta, theta
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.plan.registry import Registry
from drivetrain.testing import PluginConformance, run_distributed

INPUTS = torch.linspace(-1, 1, 8).view(2, 4)


class TestProgressiveLayerDrop(PluginConformance):
    plugin = ProgressiveLayerDrop
    config = {"progressive_layer_drop": {"enabled": True, "theta": 0.5}}


class Scaled(nn.Module):
    """One layer whose part in the output is the ratio, so that the loss shows what arrived."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.seen: list[dict[str, Any]] = []

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.seen.append(kwargs)
        return ((self.layer(x) * kwargs.get("pld_theta", 1.0) - 1) ** 2).mean()


class Named(Scaled):
    """Takes the keywords by name."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, progressive_layer_drop: bool = False, pld_theta: float = 1.0
    ) -> torch.Tensor:
        return super().forward(x, pld_theta=pld_theta)


class Plain(Scaled):
    """Takes none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)


def start(model: nn.Module, section: dict[str, Any], **keys: Any) -> drivetrain.Engine:
    config = {
        "train_batch_size": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "progressive_layer_drop": section,
        **keys,
    }
    engine, *_ = drivetrain.initialize(
        model=model, config=config, registry=Registry.installed().with_plugins(ProgressiveLayerDrop)
    )
    return engine


def train(engine: drivetrain.Engine, micro_batches: int) -> list[float]:
    losses = []
    for _ in range(micro_batches):
        loss = engine(INPUTS)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("limit", [0, 0.1, 0.9, 1])
def test_the_value_after_each_step_is_that_of_its_formula(limit: float) -> None:
    engine = start(Scaled(), {"enabled": True, "theta": limit, "gamma": 0.05})
    assert current_theta(engine) == 1.0
    for step in range(6):
        train(engine, 1)
        expected = (1 - limit) * math.exp(-0.05 * step) + limit
        assert current_theta(engine) == pytest.approx(expected, rel=1e-12)
    engine.destroy()


def test_the_formula_is_a_function_of_the_step_alone() -> None:
    assert theta(0, 0.25, 0.5) == 1.0
    assert theta(2, 0.25, 0.5) == pytest.approx(0.25 + 0.75 * 0.36787944117144233)
    assert theta(10_000, 0.25, 0.5) == 0.25


def test_a_model_that_uses_the_ratio_trains_as_if_it_had_computed_it() -> None:
    engine = start(Scaled(), {"enabled": True, "theta": 0.2, "gamma": 0.3})
    losses = train(engine, 8)
    engine.destroy()
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    for step in range(8):
        ratio = 0.2 + 0.8 * math.exp(-0.3 * max(step - 1, 0))
        loss = model(INPUTS, pld_theta=ratio)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-6)


def test_micro_batches_of_one_step_get_one_ratio_and_evaluation_gets_none() -> None:
    engine = start(Scaled(), {"enabled": True}, train_batch_size=4, gradient_accumulation_steps=2)
    train(engine, 6)
    engine.eval()
    engine(INPUTS)
    *training, evaluation = engine.module.seen
    assert all(kwargs["progressive_layer_drop"] is True for kwargs in training)
    ratios = [kwargs["pld_theta"] for kwargs in training]
    assert ratios == pytest.approx([1, 1, 1, 1] + [0.5 + 0.5 * math.exp(-0.001)] * 2, rel=1e-12)
    assert evaluation == {}
    engine.destroy()


def test_keywords_may_be_taken_by_name() -> None:
    engine = start(Named(), {"enabled": True})
    train(engine, 1)
    assert engine.module.seen == [{"pld_theta": 1.0}]
    engine.destroy()


def test_a_model_that_cannot_take_the_keywords_is_refused() -> None:
    engine = start(Plain(), {"enabled": True})
    message = (
        "progressive_layer_drop: calls the model with progressive_layer_drop and pld_theta, but "
        "the forward of Plain does not take progressive_layer_drop and pld_theta; add them"
    )
    with pytest.raises(ConfigError, match=message):
        engine(INPUTS)
    engine.eval()
    engine(INPUTS)
    engine.destroy()


def test_a_section_that_is_not_enabled_changes_nothing() -> None:
    engine = start(Plain(), {"theta": 0.1})
    train(engine, 1)
    assert current_theta(engine) is None
    engine.destroy()


def test_the_ratio_goes_on_after_a_resume(tmp_path: Path) -> None:
    section = {"enabled": True, "theta": 0.1, "gamma": 0.5}
    engine = start(Scaled(), section)
    train(engine, 3)
    engine.save_checkpoint(str(tmp_path))
    straight = train(engine, 2)
    engine.destroy()
    engine = start(Scaled(), section)
    engine.load_checkpoint(str(tmp_path))
    assert train(engine, 2) == straight
    engine.destroy()


def ratios() -> list[float]:
    engine = start(Scaled(), {"enabled": True, "gamma": 0.5})
    train(engine, 4)
    seen = [kwargs["pld_theta"] for kwargs in engine.module.seen]
    engine.destroy()
    return seen


def test_all_ranks_get_the_same_ratios() -> None:
    one, other = run_distributed(ratios, 2)
    assert one == other
    assert one[-1] < 1


@pytest.mark.parametrize(
    ("section", "path"),
    [({"theta": 1.5}, "theta"), ({"theta": -0.1}, "theta"), ({"gamma": -1}, "gamma")],
)
def test_values_out_of_range_are_refused_by_their_path(section: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=f"progressive_layer_drop.{path}"):
        start(Scaled(), {"enabled": True, **section})


def test_a_script_may_step_the_schedule_itself() -> None:
    from drivetrain_progressive_layer_drop.deepspeed import ProgressiveLayerDrop as Schedule

    schedule = Schedule(theta=0.5, gamma=0.1)
    assert schedule.get_theta() == 1.0
    for step in (0, 3):
        schedule.update_state(step)
        assert schedule.get_theta() == pytest.approx(0.5 * math.exp(-0.1 * step) + 0.5)
    assert schedule.get_state() == {
        "progressive_layer_drop": True,
        "pld_theta": schedule.get_theta(),
    }
