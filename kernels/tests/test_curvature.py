"""Power iteration against eigenvalues of the whole Hessian."""

from __future__ import annotations

import pytest
import torch
from drivetrain_kernels.curvature import largest_eigenvalue, normalised
from torch import nn


def problem() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(20, 4).double(), torch.randn(20, 2).double()
    return model, (model(x) - y).square().mean()


def whole_hessian(loss: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    rows = [
        torch.autograd.grad(f, parameters, retain_graph=True, materialize_grads=True) for f in flat
    ]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


@pytest.mark.parametrize("part", [0, 2])
def test_it_is_the_largest_of_the_whole_hessian(part: int) -> None:
    model, loss = problem()
    parameters = list(model[part].parameters())  # type: ignore[index]
    values = torch.linalg.eigvalsh(whole_hessian(loss, parameters))
    wanted = values[values.abs().argmax()]
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    state = torch.get_rng_state()
    found = largest_eigenvalue(gradients, parameters, max_iter=2000, tolerance=1e-12)
    assert found == pytest.approx(float(wanted), rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    loose = largest_eigenvalue(gradients, parameters)
    assert loose == pytest.approx(float(wanted), rel=0.1)


def test_ranks_have_the_hessian_of_the_mean_of_their_losses() -> None:
    model, loss = problem()
    parameters = list(model[0].parameters())  # type: ignore[index]
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    calls = []

    def halve(tensor: torch.Tensor) -> None:  # another rank with a loss of 0
        calls.append(tensor.shape)
        tensor /= 2

    alone = largest_eigenvalue(gradients, parameters, tolerance=1e-9, max_iter=500)
    both = largest_eigenvalue(gradients, parameters, tolerance=1e-9, max_iter=500, reduce=halve)
    assert both == pytest.approx(alone / 2, rel=1e-5)
    assert calls[0] == (25,)


def test_what_is_flat_or_not_finite_has_no_curvature() -> None:
    weight = torch.ones(3, requires_grad=True)
    (flat,) = torch.autograd.grad(weight.sum(), weight, create_graph=True)
    assert largest_eigenvalue([flat], [weight]) == 0.0
    (steep,) = torch.autograd.grad((weight * torch.inf).pow(2).sum(), weight, create_graph=True)
    assert largest_eigenvalue([steep], [weight]) == 0.0
    assert normalised([-4.0, 2.0, 0.0]) == [1.0, 0.5, 1.0]
    assert normalised([]) == []
