"""Operations of layers and models equal what is counted by hand, and by torch's own counter."""

from __future__ import annotations

import pytest
import torch
from drivetrain_profiler import FlopsProfiler, get_model_profile, register_formula
from drivetrain_profiler.counter import OperationCounter
from drivetrain_profiler.places import ModuleHooks
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from drivetrain.errors import TrainingError


class Block(nn.Module):
    """Normalises, attends with two heads, and has a feed-forward network four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).unbind(-3)
        y = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Two blocks; the second may be computed again in backward."""

    def __init__(self, width: int = 8, again: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 16, bias=False)
        self.again = again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        x = checkpoint(self.blocks[1], x, use_reentrant=False) if self.again else self.blocks[1](x)
        return self.head(x)


B, S, W = 3, 5, 8


def macs_of_block() -> int:
    projections = B * S * W * (3 * W + W + 4 * W + 4 * W)
    return projections + 2 * B * S * S * W


def test_a_transformer_is_counted_as_by_hand() -> None:
    flops, macs, params = get_model_profile(
        Model(), (B, S, W), print_profile=False, as_string=False
    )
    assert macs == 2 * macs_of_block() + B * S * W * 16
    per_token = 5 * W + W + 4 * W + W  # norm, sum, relu, sum
    assert flops == 2 * macs + 2 * B * S * per_token
    assert params == sum(p.numel() for p in Model().parameters())


def counted(model: nn.Module, x: torch.Tensor) -> OperationCounter:
    counter = OperationCounter()
    hooks = ModuleHooks(model.named_modules(), counter.enter_module, counter.leave_module)
    with counter:
        model(x).sum().backward()
    hooks.remove()
    return counter


def test_each_part_of_backward_belongs_to_its_module() -> None:
    counter = counted(Model(again=True), torch.randn(B, S, W, requires_grad=True))
    forward = {
        name: cost.macs for (name, which), cost in counter.costs.items() if which == "forward"
    }
    linear = [name for name in forward if name.endswith(("qkv", "out", "up", "down", "head"))]
    assert len(linear) == 9
    for name in linear:  # one product for the inputs, one for the weights
        assert counter.costs[name, "backward"].macs == 2 * forward[name]
    again = {
        name: cost.flops for (name, which), cost in counter.costs.items() if which == "recompute"
    }
    # The last layer's inputs are all that is needed of it, so recomputation ends before it.
    assert set(again) == {n for n in forward if n.startswith("blocks.1")} - {"blocks.1.down"}
    del again["blocks.1"]  # ends in its middle
    for name, flops in again.items():
        assert flops == counter.costs[name, "forward"].flops


def test_products_agree_with_torchs_counter_in_both_directions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, groups=3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    )
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    torchs = FlopCounterMode(display=False)
    with torchs:
        model(x).sum().backward()
    ours = counted(model, x)
    assert 2 * sum(cost.macs for cost in ours.costs.values()) == torchs.get_total_flops()


def test_attention_on_a_host_counts_which_torchs_counter_leaves_out() -> None:
    q = torch.randn(2, 4, 6, 8)
    k, v = torch.randn(2, 4, 10, 8), torch.randn(2, 4, 10, 8)
    counter = OperationCounter()
    with counter:
        scaled_dot_product_attention(q, k, v)
    assert counter.costs["", "forward"].macs == 2 * 2 * 4 * 6 * 10 * 8


def test_without_autograd_the_same_is_counted() -> None:
    model, x = Model(), torch.randn(B, S, W)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    with torch.inference_mode():
        model(x)
    profiler.stop_profile()
    assert profiler.get_total_macs() == 2 * macs_of_block() + B * S * W * 16
    assert [name for name in vars(model) if name.endswith("_hooks") and vars(model)[name]] == []


def test_ignored_modules_count_nothing_and_their_neighbours_do() -> None:
    _, macs, _ = get_model_profile(
        Model(), (B, S, W), print_profile=False, as_string=False, ignore_modules=[Block]
    )
    assert macs == B * S * W * 16


@torch.library.custom_op("profiler_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Custom(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return twice(x)


def test_operators_of_others_are_named_until_somebody_gives_a_formula(
    capsys: pytest.CaptureFixture[str],
) -> None:
    get_model_profile(Custom(), (2, 2))
    assert "not counted, see register_formula: profiler_tests::twice (1 calls)" in (
        capsys.readouterr().out
    )
    register_formula("profiler_tests::twice", lambda x, **_: 2 * x.numel())
    flops, _, _ = get_model_profile(Custom(), (2, 2), as_string=False)
    assert flops == 8
    assert "not counted" not in capsys.readouterr().out


def test_the_report_has_every_module_with_its_share(capsys: pytest.CaptureFixture[str]) -> None:
    get_model_profile(Model(), (B, S, W), top_modules=2)
    text = capsys.readouterr().out
    assert "(head): Linear  128 params (7.2 %), 1.92 k MACs (" in text
    assert text.count("(qkv): Linear") == 2
    assert "depth 0:" in text
    assert "Block 1.58 k, Linear" not in text  # blocks lie deeper than the head
    get_model_profile(Model(), (B, S, W), module_depth=1)
    assert "(qkv)" not in capsys.readouterr().out


def test_a_call_needs_inputs_and_a_mode_that_exists() -> None:
    with pytest.raises(TrainingError, match="either input_shape or the arguments"):
        get_model_profile(Model())
    with pytest.raises(TrainingError, match="'train'; a model can be profiled in 'forward'"):
        get_model_profile(Model(), (B, S, W), mode="train")  # type: ignore[arg-type]
    profiler = FlopsProfiler(Model())
    profiler.start_profile()
    with pytest.raises(TrainingError, match="begun already"):
        profiler.start_profile()
    profiler.end_profile()
