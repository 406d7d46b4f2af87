"""Backward passes are told from others, and leave no hooks behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from drivetrain.engine.backward_window import BackwardWindow


class Counted:
    """A model whose outputs are watched, and how often a backward began and ended."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
        self.began = self.ended = 0
        self.window = BackwardWindow(self._begin, self._end)

    def _begin(self) -> None:
        self.began += 1

    def _end(self) -> None:
        self.ended += 1

    def __call__(self, x: torch.Tensor, reentrant: bool = False) -> torch.Tensor:
        out = checkpoint(self.model, x, use_reentrant=True) if reentrant else self.model(x)
        self.window.watch(out)
        return out.sum()

    @property
    def passes(self) -> tuple[int, int]:
        return self.began, self.ended


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "re-entrant"])
def test_a_backward_begins_and_ends_once(reentrant: bool) -> None:
    counted = Counted()
    for number in (1, 2):
        counted(torch.randn(2, 3, requires_grad=True), reentrant).backward()
        assert counted.passes == (number, number)


def test_a_derivative_by_inputs_or_parameters_is_no_backward() -> None:
    counted = Counted()
    x = torch.randn(2, 3, requires_grad=True)
    for inputs in (x, list(counted.model.parameters())):
        for again in (False, True):
            torch.autograd.grad(counted(x), inputs, create_graph=again)
    torch.func.grad(counted)(torch.randn(2, 3))
    torch.func.vmap(torch.func.grad(counted))(torch.randn(4, 2, 3))
    assert counted.passes == (0, 0)


def test_a_backward_to_chosen_tensors_is_one() -> None:
    counted = Counted()
    counted(torch.randn(2, 3)).backward(inputs=[counted.model[2].weight])
    assert counted.passes == (1, 1)


def test_a_backward_under_vmap_is_noticed() -> None:
    counted = Counted()
    torch.func.vmap(counted)(torch.randn(4, 3)).sum().backward()
    assert counted.passes == (1, 1)


def test_watched_parameters_get_no_hooks() -> None:
    window = BackwardWindow(lambda: None, lambda: None)
    scale = nn.Parameter(torch.ones(()))
    for _ in range(3):
        window.watch({"features": scale * 2, "scale": scale})
    assert not scale._backward_hooks
