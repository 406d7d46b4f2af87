"""muP: rates by width, as the paper's table gives them, through torch's own groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.testing.models import mlp

RATE, DECAY = 0.01, 0.1


@dataclass
class Shape:
    """What the package ``mup`` attaches to a parameter, as far as optimizers ask it."""

    growing: int
    fan_in: float
    fan_out: float

    def ninf(self) -> int:
        return self.growing

    def width_mult(self) -> float:
        return self.fan_in if self.growing == 2 else self.fan_out

    def fanin_fanout_mult_ratio(self) -> float:
        return self.fan_in / self.fan_out


def shaped() -> nn.Module:
    """The width has grown by 4: inputs and outputs have not."""
    module = mlp()
    first, second, third = module.layers[0], module.layers[2], module.layers[4]
    shapes = {
        first.weight: Shape(1, 1, 4),
        first.bias: Shape(1, 1, 4),
        second.weight: Shape(2, 4, 2),
        second.bias: Shape(1, 1, 4),
        third.weight: Shape(1, 1, 4),
        third.bias: Shape(0, 1, 1),
    }
    for parameter, shape in shapes.items():
        parameter.infshape = shape
    return module


def reference(kind: str) -> list[torch.Tensor]:
    """Groups of torch's optimizer, one for each parameter."""
    module = shaped()
    groups = []
    for p in module.parameters():
        shape, rate, decay = p.infshape, RATE, DECAY
        if kind != "MuSGD" and shape.growing == 2:  # table 8: matrices by 1 / fan-in
            rate, decay = rate / shape.fan_in, decay * shape.fan_in
        if kind == "MuSGD" and shape.growing == 1:
            rate, decay = rate * shape.fan_out, decay / shape.fan_out
        if kind == "MuSGD" and shape.growing == 2:
            rate = rate * shape.fan_out / shape.fan_in
            decay = decay * shape.fan_in / shape.fan_out
        groups.append({"params": [p], "lr": rate, "weight_decay": decay})
    made = {"MuAdam": torch.optim.Adam, "MuAdamW": torch.optim.AdamW, "MuSGD": torch.optim.SGD}
    optimizer = made[kind](groups)
    for inputs in data():
        optimizer.zero_grad()
        module(inputs, inputs.roll(1, 1)).backward()
        optimizer.step()
    return [p.detach() for p in module.parameters()]


def data() -> list[torch.Tensor]:
    return [torch.randn(4, 8, generator=torch.Generator().manual_seed(s)) for s in range(5)]


def engine_of(kind: str, module: nn.Module) -> Any:
    config = {
        "train_batch_size": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": kind, "params": {"lr": RATE, "weight_decay": DECAY}},
    }
    return drivetrain.initialize(model=module, config=config)[0]


@pytest.mark.parametrize("kind", ["MuAdam", "MuAdamW", "MuSGD"])
def test_each_parameter_steps_at_the_rate_of_its_width(kind: str) -> None:
    module = shaped()
    engine = engine_of(kind, module)
    for inputs in data():
        engine.backward(engine(inputs, inputs.roll(1, 1)))
        engine.step()
    for parameter, expected in zip(module.parameters(), reference(kind), strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)
    engine.destroy()


def test_a_model_without_base_shapes_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"has no infshape; call mup.set_base_shapes"):
        engine_of("MuAdam", mlp())


def test_three_growing_dimensions_are_refused() -> None:
    module = shaped()
    module.layers[2].weight.infshape = Shape(3, 4, 4)
    with pytest.raises(ConfigError, match=r"3 dimensions of parameter layers.2.weight"):
        engine_of("MuSGD", module)
