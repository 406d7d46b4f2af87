"""What a config asks of layers and the model cannot give is refused by name, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain_tensor.analysis import analyse
from drivetrain_tensor.rules import Rules
from drivetrain_tensor.section import PartitionConfig
from tensor_models import build
from test_tensor_training import make
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed

WIDTH = 8


def analysed(model: nn.Module, **config: Any) -> Any:
    rules = Rules(PartitionConfig.model_validate(config), model)
    return analyse(model, 2, rules)


def spec(pattern: str, kind: str = "column") -> dict[str, Any]:
    return {"patterns": [pattern], "partition_type": kind}


REFUSED = {
    r"pattern '.*wq.weight' matches no layer; their weights are such as model.embed": {
        "layer_specs": [spec(".*wq.weight")]
    },
    r"model.layers.0.self_attn.q_proj.weight is matched by 2 specs that cut it in different": {
        "layer_specs": [spec(r".*q_proj\.weight"), spec(r".*layers\.0\..*\.weight", "row")]
    },
    r"o_proj.weight is to be cut by column, which the way .* not allow \(it cuts by row\)": {
        "layer_specs": [spec(r".*o_proj\.weight")]
    },
    r"up_proj.weight is to be cut by row, which": {
        "layer_specs": [spec(r".*up_proj.weight", "row")]
    },
    r"strict_mode: no pattern names model.layers.0.mlp.gate_proj.weight, and it is whole": {
        "layer_specs": [spec(r".*self_attn.*(q|k|v)_proj\.weight"), spec(r".*o_proj.*", "row")],
        "use_default_specs": False,
        "strict_mode": True,
    },
}


@pytest.mark.parametrize("text", REFUSED)
def test_patterns_that_do_not_fit_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        analysed(build("llama"), **REFUSED[text])


def test_what_patterns_skip_or_do_not_name_stays_whole() -> None:
    skipped = analysed(build("llama"), layer_specs=[spec(r".*layers\.0\.mlp\.up_proj.*", "skip")])
    _, rows = skipped.columns_and_rows()
    whole = "model.layers.0.mlp.down_proj"
    assert whole not in {p.path for p in rows}
    assert skipped.kept[whole] == "a pattern keeps it whole"
    assert "model.layers.1.mlp.down_proj" in {p.path for p in rows}
    specs = [spec(r".*layers\.0\.mlp\.(up|gate)_proj.*"), spec(r".*0\.mlp\.down_proj.*", "row")]
    named = analysed(build("llama"), layer_specs=specs, use_default_specs=False)
    assert {p.path for p in named.columns_and_rows()[1]} == {whole}


def test_a_spec_of_another_kind_of_model_does_not_count() -> None:
    spec_of_other = {**spec(r".*nothing.*"), "model_types": ["bloom"]}
    assert analysed(build("llama"), layer_specs=[spec_of_other]).decisions


class Mixing(nn.Module):
    """A norm between its layers mixes all features."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(WIDTH, 12), nn.LayerNorm(12), nn.Linear(12, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)))


class Particular(Mixing):
    """It runs with nothing that could be guessed."""

    def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().forward(x["features"])


def test_numbers_are_tried_where_tokens_could_not_be_multiplied() -> None:
    """Prepared numbers take the place of products, which would hide it."""
    found = analyse(nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH)), 2, _no())
    assert found.probe.args[0].is_floating_point()
    assert found.probe.args[0].shape[-1] == WIDTH
    assert len(found.decisions) == 1


def _no() -> Rules:
    return Rules(None, nn.Module())


class Marked(nn.Module):
    """A layer of a script's own, with attributes in Megatron's manner."""

    def __init__(self, dim: int | None, stride: int) -> None:
        super().__init__()
        self.weight: Any = nn.Parameter(torch.ones(6, 4))
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim, self.weight.partition_stride = dim, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def refusals() -> list[str]:
    found = []
    modules = [Mixing(), Particular(), Marked(None, 1), Marked(2, 1), Marked(0, 4), Marked(1, 2)]
    for module in modules:
        try:
            make(module, 2)
        except ConfigError as error:
            found.append(str(error))
        else:
            found.append("nothing")
    return found


def test_models_that_cannot_be_cut_are_refused_on_every_rank() -> None:
    expected = (
        "no layer of Mixing can be cut: ",
        "Particular did not run with any sample that was tried: set model.drivetrain_sample",
        "weight has tensor_model_parallel set, and partition_dim None, which is no dimension",
        "partition_dim 2, which is no dimension of a tensor of shape (6, 4)",
        "weight has partition_stride 4, which cannot be along dimension 0 of 6",
        "weight has partition_stride 2, which cannot be along dimension 1 of 4",
    )
    for found in run_distributed(refusals, 2):
        for text, message in zip(expected, found, strict=True):
            assert text in message
        assert "all of its inputs depend on all of what it reads" in found[0]
