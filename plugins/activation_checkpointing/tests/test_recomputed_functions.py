"""Recomputed functions compute what they compute alone, bit for bit, whatever they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from drivetrain_activation_checkpointing import checkpoint, configure, non_reentrant_checkpoint
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from drivetrain.errors import ConfigError, TrainingError

BOTH = pytest.mark.parametrize("run", [checkpoint, non_reentrant_checkpoint])
Run = Callable[..., Any]


def plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


class Net(nn.Module):
    """Batch normalisation, which changes buffers, and dropout, which draws."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


class Shrinking(nn.Module):
    """A buffer decides what is computed and is changed by it, as a spectral norm's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = self.count + 1
        return self.linear(x).tanh() * self.count


def trained(run: Run, module: nn.Module, backwards: int = 1) -> list[torch.Tensor]:
    """Gradients and buffers after three forwards in a row and their backward."""
    torch.manual_seed(1)
    x = torch.randn(5, 4, requires_grad=True)
    y = x * 1
    for _ in range(3):
        y = run(module, y)
    for left in reversed(range(backwards)):
        y.square().sum().backward(retain_graph=left > 0)
    grads = [x.grad, *(p.grad for p in module.parameters())]
    return [y.detach(), *(g.clone() for g in grads if g is not None), *module.buffers()]


@BOTH
@pytest.mark.parametrize("make", [Net, Shrinking])
@pytest.mark.parametrize("backwards", [1, 2])
def test_gradients_and_buffers_are_bitwise_those_of_the_plain_module(
    run: Run, make: Callable[[], nn.Module], backwards: int
) -> None:
    expected = trained(plain, make(), backwards)
    found = trained(run, make(), backwards)
    assert len(found) == len(expected)
    # A re-entrant backward adds up a parameter's gradients of several calls in another order.
    tolerance = 1e-5 if run is checkpoint else 0.0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@BOTH
def test_buffers_that_only_training_changes_are_found_after_an_evaluation(run: Run) -> None:
    module, other = Net().eval(), Net().eval()
    for net, how in ((module, run), (other, plain)):
        how(net, torch.ones(5, 4, requires_grad=True)).sum().backward()
        net.train()
        trained(how, net)
    assert torch.equal(module.norm.running_mean, other.norm.running_mean)
    assert int(module.norm.num_batches_tracked) == 3


@BOTH
def test_parameters_get_gradients_where_no_input_has_one(run: Run) -> None:
    module, other = Net(), Net()
    for net, how in ((module, run), (other, plain)):
        torch.manual_seed(3)
        with torch.no_grad():
            x = torch.randn(5, 4) * 2
        how(net, x).sum().backward()
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, q.grad)


@BOTH
def test_a_frozen_module_without_gradients_is_only_run(run: Run) -> None:
    assert not run(Net().requires_grad_(False), torch.ones(5, 4)).requires_grad


@BOTH
def test_arguments_and_results_may_be_nested_and_no_tensors(run: Run) -> None:
    def mix(
        pair: tuple[torch.Tensor, str], scale: float, *, more: dict[str, Any]
    ) -> dict[str, Any]:
        out = pair[0] * scale + more["x"][0].sin()
        return {"out": [out, None], "name": pair[1], "twice": (out * 2, 7)}

    def gradients(how: Run) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (torch.linspace(0, 1, 4).requires_grad_() for _ in range(2))
        found = how(mix, (x, "a"), 3.0, more={"x": [y]})
        assert (found["name"], found["twice"][1], found["out"][1]) == ("a", 7, None)
        (found["out"][0] * found["twice"][0]).sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        return x.grad, y.grad

    for one, other in zip(gradients(run), gradients(plain), strict=True):
        assert torch.equal(one, other)


def test_a_backward_through_a_backward_goes_through_it() -> None:
    def penalty(how: Run) -> torch.Tensor:
        module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(0.3)
        x = torch.ones(2, 3, requires_grad=True)
        (slope,) = torch.autograd.grad(how(module, x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        assert module[0].weight.grad is not None
        return module[0].weight.grad

    assert torch.equal(penalty(non_reentrant_checkpoint), penalty(plain))


@BOTH
def test_only_inputs_are_saved(run: Run) -> None:
    module = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)])

    def saved(how: Run) -> int:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(0 if isinstance(tensor, nn.Parameter) else tensor.numel())
            return tensor

        x = torch.ones(4, 8, requires_grad=True)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            y = how(module[:3], x)
            y = how(module[3:], y)
        y.sum().backward()
        return sum(sizes)

    assert saved(run) == 2 * 4 * 8
    assert saved(plain) >= 6 * 4 * 8


@BOTH
def test_autocast_is_repeated(run: Run) -> None:
    def half(how: Run) -> torch.Tensor:
        linear = nn.Linear(4, 4)
        with torch.no_grad():
            linear.weight.copy_(torch.linspace(0, 1, 16).view(4, 4))
            linear.bias.zero_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = how(lambda x: linear(x).sin(), torch.linspace(0, 2, 4).requires_grad_())
        y.sum().backward()
        assert linear.weight.grad is not None
        return linear.weight.grad

    assert torch.equal(half(run), half(plain))


@dataclass
class Result:
    value: torch.Tensor


def test_a_result_that_hides_tensors_is_refused_re_entrantly() -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(TrainingError, match="returns a Result, whose tensors would get no"):
        checkpoint(lambda t: Result(t * 2), x)
    found = non_reentrant_checkpoint(lambda t: Result(t.square()), x)
    found.value.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2]


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected a config or the path of one"):
        configure(deepspeed_config=3)
