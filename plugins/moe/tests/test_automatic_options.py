"""Experts of a model that a pattern names, and balance by the bias of its own router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_automatic_experts import Listed, TwoLayers, batch, build, rows_of
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed

BIAS_RATE, STEP = 0.25, 1


def engine_of(model: nn.Module, **section: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "expert_parallel": {"enabled": True, "autoep_size": 2, **section},
    }
    return drivetrain.initialize(model=model, config=config)[0]


def biases(model: nn.Module) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")]


def moved_biases() -> list[list[float]]:
    engine = engine_of(build("deepseek_v3"), bias_update_rate=BIAS_RATE)
    engine.backward(engine(**batch(STEP, engine.job.rank)).loss)
    engine.step()
    found = [bias.tolist() for bias in biases(engine.module)]
    engine.destroy()
    return found


def test_the_bias_of_a_models_own_router_moves_towards_equal_load() -> None:
    model, chosen = build("deepseek_v3"), list[torch.Tensor]()

    def note(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        chosen.extend(x.flatten() for x in inputs if not x.is_floating_point())

    (layer,) = (m for n, m in model.named_modules() if n.endswith("mlp.experts"))
    layer.register_forward_pre_hook(note)
    (before,) = (bias.clone() for bias in biases(model))
    for shard in range(2):
        model(**batch(STEP, shard))
    counts = torch.bincount(torch.cat(chosen), minlength=4).double()
    expected = before + BIAS_RATE * torch.sign(counts.mean() - counts)
    assert not torch.equal(expected, before)
    for (bias,) in run_distributed(moved_biases, 2):
        torch.testing.assert_close(torch.tensor(bias, dtype=expected.dtype), expected)


class RenamedLayer(Listed):
    """A list of experts whose name does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self._modules["branches"] = self._modules.pop("experts")

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__("branches" if name == "experts" else name)


class Renamed(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(RenamedLayer() for _ in range(2)).double()


def held_by_name(pattern: str) -> list[int]:
    engine = engine_of(Renamed(), expert_pattern=pattern)
    engine.backward(engine(rows_of(2 * engine.job.rank)))
    engine.step()
    found = [len(layer.branches) for layer in engine.module.layers]
    engine.destroy()
    return found


def test_a_pattern_names_experts_that_are_called_otherwise_and_leaves_the_rest() -> None:
    for found in run_distributed(held_by_name, 2, r"layers\.1\.branches"):
        assert found == [4, 2]
    with pytest.raises(ConfigError, match="Renamed has no module that looks like"):
        engine_of(Renamed(), autoep_size=1)
