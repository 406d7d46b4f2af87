"""DeepSpeed's names for compression."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_models import batches, group, method, net
from drivetrain_compression.deepspeed.compress import (
    compression_scheduler,
    convert_conv1d_to_linear,
    fake_quantise,
    init_compression,
    redundancy_clean,
    student_initialization,
)
from drivetrain_compression.quantisers import integer
from torch import nn

from drivetrain.errors import ConfigError


def config() -> dict[str, Any]:
    bits = {"start_bits": 8, "target_bits": 4}
    return {
        "compression_training": {
            "weight_quantization": method({"schedule_offset": 2}, {"g": group(["up"], **bits)}),
            "row_pruning": method(
                {"schedule_offset": 1}, {"g": group([r"\.up"], [[r"\.down"]], dense_ratio=0.5)}
            ),
        }
    }


def test_a_script_without_an_engine_tells_the_scheduler_of_steps() -> None:
    model = init_compression(net(), config())
    scheduler = compression_scheduler(model, config())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for tokens, targets in batches(4):
        scheduler.step(step_zero_check=True)
        model(tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        seen.append(
            (scheduler.training_steps, scheduler.weight_quantization_enabled,
             int(model.layers[0].up.row_pruning_mask.sum()))
        )  # fmt: skip
    assert seen == [(1, False, 16), (2, True, 16), (3, True, 16), (4, True, 16)]
    model.eval()
    wanted = model(*batches(1)[0])
    redundancy_clean(model, config())
    assert model.layers[0].up.out_features == 16
    torch.testing.assert_close(model(*batches(1)[0]), wanted, rtol=1e-12, atol=0)
    with pytest.raises(ConfigError, match="call init_compression first"):
        compression_scheduler(net())
    with pytest.raises(ConfigError, match="mpu"):
        init_compression(net(), config(), mpu=object())
    with pytest.raises(ConfigError, match="layer_reduction is not enabled"):
        student_initialization(net(), net(), config())


class Conv1D(nn.Module):
    """A linear layer with its weight [in, out]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def test_layers_with_transposed_weights_become_linear_layers() -> None:
    model = nn.Sequential(Conv1D(6, 4), nn.Sequential(Conv1D(3, 6)))
    x = torch.randn(5, 4)
    wanted = model(x)
    assert convert_conv1d_to_linear(model, Conv1D) is model
    assert [type(m) for m in model.modules() if not list(m.children())] == [nn.Linear] * 2
    torch.testing.assert_close(model(x), wanted)
    assert model[0].weight.shape == (6, 4)
    with pytest.raises(ConfigError, match="has no weight"):
        convert_conv1d_to_linear(nn.Sequential(nn.LayerNorm(3)), nn.LayerNorm)


@pytest.mark.parametrize("asym", [False, True])
def test_fake_quantisation_works_in_place(asym: bool) -> None:
    values = torch.randn(4, 6, dtype=torch.float64)
    kind = integer.asymmetric if asym else integer.symmetric
    wanted = kind(values.view(3, 8), 4).view(4, 6)
    assert fake_quantise(values, 3, 4, asym=asym) is values
    assert torch.equal(values, wanted)
    assert fake_quantise(torch.randn(8), sr=True).shape == (8,)
    with pytest.raises(ConfigError, match="2 bits"):
        fake_quantise(values, bit_num=2)
