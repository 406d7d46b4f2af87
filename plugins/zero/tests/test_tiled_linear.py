"""``TiledLinear`` against ``nn.Linear``, alone and under stage 3."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from drivetrain_zero import Init, TiledLinear, TiledLinearReturnBias
from drivetrain_zero.gathering.unit import GatheredUnit, find_units
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.states.whole import whole
from drivetrain.testing import data, run_distributed
from drivetrain.testing.reference import reference_losses


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 1), (1, 4), (2, 3), (7, 5)])
def test_values_and_gradients_are_those_of_one_linear_layer(bias, rows, columns) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(11, 7, bias=bias, dtype=torch.float64)
    tiled = TiledLinear(
        11, 7, bias, in_splits=columns, out_splits=rows, init_linear=plain, dtype=torch.float64
    )
    x = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    expected, got = plain(x), tiled(y)
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    gradient = torch.cat([torch.cat([t.weight.grad for t in row], 1) for row in tiled.linears])
    torch.testing.assert_close(gradient, plain.weight.grad)
    if bias:
        of_bias = torch.cat([row[-1].bias.grad for row in tiled.linears])
        torch.testing.assert_close(of_bias, plain.bias.grad)


def test_parts_are_taken_and_returned_as_asked() -> None:
    plain = nn.Linear(5, 4)
    tiled = TiledLinear(
        *(5, 4),
        in_splits=2,
        out_splits=2,
        input_is_already_split=True,
        combine_out_splits=False,
        init_linear=plain,
    )
    x = torch.randn(3, 5)
    top, bottom = tiled([x[:, :3], x[:, 3:]])
    torch.testing.assert_close(torch.cat([top, bottom], 1), plain(x))
    with pytest.raises(ConfigError, match="input in 2 parts, got 1"):
        tiled([x])


class SkipsBias(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return x @ self.weight.t(), self.bias


def test_layers_that_return_their_bias_are_tiled_too() -> None:
    plain = nn.Linear(6, 5)
    tiled = TiledLinearReturnBias(
        6, 5, in_splits=2, out_splits=2, linear_cls=SkipsBias, init_linear=plain
    )
    x = torch.randn(3, 6)
    output, bias = tiled(x)
    torch.testing.assert_close(output + bias, plain(x))


def test_impossible_tilings_are_refused() -> None:
    with pytest.raises(ConfigError, match="out_splits is 5, expected 1 to out_features = 4"):
        TiledLinear(4, 4, out_splits=5)
    with pytest.raises(ConfigError, match=r"of 4 x 4 cannot take a weight of shape \(3, 4\)"):
        TiledLinear(4, 4, init_linear=nn.Linear(4, 3))
    with pytest.raises(ConfigError, match="must both have a bias"):
        TiledLinear(4, 4, init_linear=nn.Linear(4, 4, bias=False))


class Block(nn.Module):
    def __init__(self, tiles: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = TiledLinear(8, 16, out_splits=tiles) if tiles else nn.Linear(8, 16)
        self.down = TiledLinear(16, 8, in_splits=tiles) if tiles else nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, tiles: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(tiles) for _ in range(2))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return (inputs - targets).square().mean()


def plain_net() -> nn.Module:
    torch.manual_seed(6)
    return Net(0)


def test_every_tile_is_a_unit_and_the_block_keeps_the_rest() -> None:
    sizes = {unit.name: sum(p.numel() for p in unit.parameters) for unit in find_units(Net(4))}
    assert sizes[""] == 0
    assert sizes["blocks.1"] == 16
    assert sizes["blocks.1.up.linears.2.0"] == 4 * 8 + 4
    assert sizes["blocks.0.down.linears.0.3"] == 4 * 8 + 8
    assert len(sizes) == 1 + 2 * (1 + 4 + 4)
    assert sum(sizes.values()) == sum(p.numel() for p in plain_net().parameters())


def check_training() -> tuple[list[float], int]:
    with Init():
        module = Net(4)
    source = plain_net()
    for block, plain in zip(module.blocks, source.blocks, strict=True):
        block.up.copy_params_from(plain.up)
        block.down.copy_params_from(plain.down)
        with whole(block.norm, write_rank=0):
            block.norm.load_state_dict(plain.norm.state_dict())
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
        },
    }
    engine, *_ = drivetrain.initialize(model=module, config=config)
    rank, losses, live = engine.job.rank, [], []
    start = GatheredUnit.start

    def watched(unit: GatheredUnit, **options: bool) -> None:
        start(unit, **options)
        live.append(sum(p.numel() for p in module.parameters() if not p.isnan().all()))

    inputs, targets = data.vectors(20)
    with patch.object(GatheredUnit, "start", watched):
        for step in range(5):
            rows = slice(4 * step + 2 * rank, 4 * step + 2 * rank + 2)
            loss = engine(inputs[rows], targets[rows])
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses, max(live)


def test_tiles_train_like_the_plain_layer_and_are_gathered_one_by_one() -> None:
    answers = run_distributed(check_training, 2)
    ours = [sum(step) / 2 for step in zip(*(losses for losses, _ in answers), strict=True)]
    inputs, targets = data.vectors(20)
    parts = [(inputs[i : i + 2], targets[i : i + 2]) for i in range(0, 20, 2)]
    expected = reference_losses(
        plain_net(),
        [parts[i : i + 2] for i in range(0, 10, 2)],
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    assert ours == pytest.approx(expected, rel=1e-5)
    for _, live in answers:
        assert live < 3 * (4 * 8 + 8) + 2 * 16  # tiles at a time, of 16 in all
