"""Dampings that are held to other data, and what inputs of layers are counted."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from drivetrain_compression import compress_module
from drivetrain_compression.calibrated import sparsing
from drivetrain_compression.calibrated.gptq import damped, invert
from drivetrain_compression.calibrated.grids import Integers, fit, stored, weight_of
from drivetrain_compression.calibrated.pruning import Pattern, sparsegpt
from drivetrain_compression.calibrated.statistics import Inputs
from test_rounding_by_error import step_by_step
from torch import nn

SHARES = (0.01, 0.03, 0.1, 0.3)
INPUTS = 24


def data(batches: int, tokens: int = 6) -> list[torch.Tensor]:
    """Batches [tokens, in] with few tokens that are large, along few directions."""
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(INPUTS, INPUTS, generator=generator) / torch.arange(1, INPUTS + 1)
    sizes = torch.randn(batches, tokens, 1, generator=generator).exp()
    x = torch.randn(batches, tokens, INPUTS, generator=generator) @ mix
    return list((x * sizes).clamp(-3, 3))


def hessian(batches: list[torch.Tensor]) -> torch.Tensor:
    x = torch.cat(batches).double()
    return 2 * x.T @ x / len(x)


def one_layer() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(INPUTS, 10, bias=False))


def compressed(modifier: dict[str, Any], batches: list[torch.Tensor]) -> torch.Tensor:
    model = one_layer()
    compress_module(model, {"modifiers": [modifier]}, [{"input": x} for x in batches])
    return model[0].weight.detach()


def gptq_of(weight: torch.Tensor, near: torch.Tensor, share: float) -> torch.Tensor:
    """Column by column in float64."""
    grid = Integers(4)
    scales = stored(fit(weight.float(), grid, 8), torch.float32)
    numbers = step_by_step(weight, near, grid, scales, range(INPUTS), share)
    return weight_of(numbers, scales)


def pruned_of(weight: torch.Tensor, near: torch.Tensor, share: float) -> torch.Tensor:
    return sparsegpt(weight, invert(near, share), Pattern.parse("2:4"))


METHODS = {
    "gptq": (
        gptq_of,
        {"gptq": {"group": 8, "act_order": False, "clip": False, "damping": "search"}},
    ),
    "sparsegpt": (pruned_of, {"sparsegpt": {"pattern": "2:4", "damping": "search"}}),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_damping_that_does_best_on_every_fourth_batch_is_taken(name: str) -> None:
    change, modifier = METHODS[name]
    batches, weight = data(12), one_layer()[0].weight.detach().double()
    fitted = [x for n, x in enumerate(batches) if n % 4 != 3]
    near, other = hessian(fitted), hessian(batches[3::4])
    lost = {}
    for share in SHARES:
        off = change(weight, near, share) - weight
        lost[share] = float((off @ other * off).sum())
    best = min(lost, key=lost.__getitem__)
    assert best > SHARES[0]
    assert lost[best] < 0.97 * lost[SHARES[0]]
    found = compressed(modifier, batches)
    wanted = change(weight, hessian(batches), best).float()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    for share in SHARES:
        if share != best:
            other_way = change(weight, hessian(batches), share).float()
            assert not torch.allclose(found, other_way, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_without_other_data_it_is_the_same_for_all(name: str) -> None:
    change, modifier = METHODS[name]
    batches, weight = data(3, tokens=40), one_layer()[0].weight.detach().double()
    wanted = change(weight, hessian(batches), 0.03).float()
    torch.testing.assert_close(compressed(modifier, batches), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_damping_that_is_given_is_kept(name: str) -> None:
    change, (kind, config) = METHODS[name][0], next(iter(METHODS[name][1].items()))
    batches, weight = data(8), one_layer()[0].weight.detach().double()
    found = compressed({kind: {**config, "damping": 0.2}}, batches)
    wanted = change(weight, hessian(batches), 0.2).float()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


class ByName(nn.Linear):
    """Called with the name of its argument, as some models call theirs."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(input=x)


@pytest.mark.parametrize("modifier", ["gptq", "round", "zeroquant"])
def test_a_layer_may_be_called_by_name(modifier: str) -> None:
    recipe = {"modifiers": [{modifier: {"bits": 8, "activations": "int8"}}]}
    batches, found = data(4), []
    for kind in (nn.Linear, ByName):
        torch.manual_seed(2)
        model = nn.Sequential(kind(INPUTS, 10, bias=False))
        compress_module(model, recipe, [{"input": x} for x in batches])
        found.append((model[0].weight.detach(), model(batches[0]).detach()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    exact = batches[0] @ found[0][0].T
    assert not torch.equal(found[0][1], exact)  # inputs are rounded


def test_weights_that_stay_are_moved_by_the_hessian_that_pruned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, settle = [], sparsing.settle

    def seeing(weight: Any, found: Any, hessian: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(hessian)
        return settle(weight, found, hessian, **options)

    monkeypatch.setattr(sparsing, "settle", seeing)
    few = data(2)  # fewer tokens than inputs, so that so little damping is not enough
    compressed({"sparsegpt": {"damping": 1e-12, "sweeps": 1}}, few)
    x = torch.cat(few)
    gram = 2 * x.T @ x / len(x)
    raised = invert(gram, 1e-12).damping
    assert raised > 1e-12
    torch.testing.assert_close(seen[0], damped(gram, raised), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["gptq", "round"])
def test_there_is_one_gram_matrix_beside_the_sums(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    gram: Any = Inputs.gram

    def once(inputs: Inputs) -> torch.Tensor:
        assert all(each() is None for each in made)
        found: torch.Tensor = gram.fget(inputs)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Inputs, "gram", property(once))
    compressed({method: {"group": 8, "clip": True}}, data(4))
    assert len(made) == 2
