"""Derivatives by inputs, of second order and by ``torch.func`` train at stage 3 as in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

import drivetrain
from drivetrain.testing import run_distributed

WIDTH, WORLD, STEPS = 6, 2, 2
Backward = Callable[..., Any]


class Block(nn.Module):
    """Its weights are worked on before its input is used, and some of it is looked at outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.size = nn.Parameter(torch.rand(WIDTH, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.size * F.normalize(self.first.weight, dim=1)
        inside = torch.tanh(F.linear(x, weight, self.first.bias))
        self.noted = inside.square().mean()
        return x + self.second(inside)


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.head = nn.Linear(WIDTH, WIDTH)

    def body(self, x: torch.Tensor, checkpointed: bool = False) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        return self.head(x)

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.body(x, **options) * self.scale


def data(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(2, 3, WIDTH, generator=generator)


# -- what a step does: ``model`` is an engine or the module itself, ``module`` always the module ---


def penalty(model: nn.Module, x: torch.Tensor, **options: Any) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (slope,) = grad(model(x, **options).sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def penalty_in_one_backward(model: Any, _: Any, x: Any, y: Any, backward: Backward) -> None:
    backward(F.mse_loss(model(x), y) + penalty(model, x))


def penalty_in_a_backward_of_its_own(
    model: Any, _: Any, x: Any, y: Any, backward: Backward
) -> None:
    backward(F.mse_loss(model(x), y))
    backward(penalty(model, x))


def penalty_waits_for_another_backward(
    model: Any, _: Any, x: Any, y: Any, backward: Backward
) -> None:
    extra = penalty(model, x)
    backward(F.mse_loss(model(x), y))
    with torch.no_grad():
        model(x)
    backward(extra)


def penalty_goes_back_twice(model: Any, _: Any, x: Any, y: Any, backward: Backward) -> None:
    extra = penalty(model, x)
    backward(extra, retain_graph=True)
    backward(extra)


def penalty_of_a_part(model: Any, module: Any, x: Any, y: Any, backward: Backward) -> None:
    backward(F.mse_loss(model(x), y))
    x = x.clone().requires_grad_()
    (slope,) = grad(module.body(x).sum(), x, create_graph=True)
    backward(slope.square().mean())


def penalty_through_checkpoints(model: Any, _: Any, x: Any, y: Any, backward: Backward) -> None:
    backward(F.mse_loss(model(x), y) + penalty(model, x, checkpointed=True))


def penalty_on_an_intermediate(model: Any, module: Any, x: Any, y: Any, backward: Backward) -> None:
    kept: list[torch.Tensor] = []
    hook = module.blocks[1].register_forward_hook(lambda _m, _i, out: kept.append(out))
    loss = F.mse_loss(model(x), y)
    hook.remove()
    (slope,) = grad(loss, kept[0], create_graph=True)
    backward(loss + slope.square().sum())


def hessian_vector_product(model: Any, module: Any, x: Any, y: Any, backward: Backward) -> None:
    loss = F.mse_loss(model(x), y)
    slopes = grad(loss, list(module.parameters()), create_graph=True)
    backward(loss + sum(slope.square().sum() for slope in slopes))


def product_of_one_layer(model: Any, module: Any, x: Any, y: Any, backward: Backward) -> None:
    slopes = grad(model(x).sum(), list(module.blocks[2].parameters()), create_graph=True)
    backward(F.mse_loss(model(x), y))
    backward(sum(slope.square().sum() for slope in slopes))


def saliency_then_training(model: Any, _: Any, x: Any, y: Any, backward: Backward) -> None:
    x = x.clone().requires_grad_()
    loss = F.mse_loss(model(x), y)
    (slope,) = grad(loss, x, retain_graph=True)
    grad(loss, x, retain_graph=True)
    backward(loss * float(slope.norm()))


def adversarial_examples(model: Any, _: Any, x: Any, y: Any, backward: Backward) -> None:
    changed = x.clone().requires_grad_()
    for _step in range(3):
        (slope,) = grad(F.mse_loss(model(changed), y), changed)
        changed.data.add_(0.1 * slope.sign())
    backward(F.mse_loss(model(changed), y))


def something_noted_inside(model: Any, module: Any, x: Any, y: Any, backward: Backward) -> None:
    loss = F.mse_loss(model(x), y)
    backward(loss + sum(block.noted for block in module.blocks))


def only_what_was_noted_inside(model: Any, module: Any, x: Any, y: Any, backward: Backward) -> None:
    model(x)
    backward(sum(block.noted for block in module.blocks))


def second_order_backward(model: Any, _: Any, x: Any, y: Any, backward: Backward) -> None:
    x = x.clone().requires_grad_()
    loss = F.mse_loss(model(x), y)
    (slope,) = grad(loss, x, create_graph=True)
    (curve,) = grad(slope.square().sum(), x, create_graph=True)
    backward(loss + slope.square().sum() + curve.square().sum())


def vmapped(model: Any, _: Any, x: Any, y: Any, backward: Backward) -> None:
    backward(F.mse_loss(torch.func.vmap(model)(x), y))


def vmapped_block(model: Any, module: Any, x: Any, y: Any, backward: Backward) -> None:
    loss = F.mse_loss(model(x), y)
    backward(loss + torch.func.vmap(module.blocks[1])(x).square().mean())


def functional_penalty(model: Any, _: Any, x: Any, y: Any, backward: Backward) -> None:
    slopes = torch.func.vmap(torch.func.grad(lambda row: model(row).square().sum()))(x)
    backward(F.mse_loss(model(x), y) + slopes.square().mean())


def forward_mode(model: Any, _: Any, x: Any, y: Any, backward: Backward) -> None:
    out, tangent = torch.func.jvp(model, (x,), (y,))
    backward(F.mse_loss(out, y) + tangent.square().mean())


def jacobians(model: Any, _: Any, x: Any, y: Any, backward: Backward) -> None:
    for vectorize in (False, True):
        whole = torch.autograd.functional.jacobian(model, x[0], vectorize=vectorize)
        torch.testing.assert_close(whole, torch.func.jacrev(model)(x[0]))
        torch.testing.assert_close(whole, torch.func.jacfwd(model)(x[0]))
    curve = torch.func.hessian(lambda row: model(row).sum())(x[0])
    other = torch.autograd.functional.hessian(lambda row: model(row).sum(), x[0])
    torch.testing.assert_close(curve, other)
    backward(F.mse_loss(model(x), y) + torch.func.jacrev(model)(x[0]).square().mean())


def gradients_of_samples(model: Any, module: Any, x: Any, y: Any, backward: Backward) -> None:
    block = module.blocks[0]
    with drivetrain.whole(block):
        own = {name: p.detach().clone() for name, p in block.named_parameters()}
    apart = torch.func.functional_call
    one = torch.func.grad(lambda q, row: apart(block, q, (row,)).square().sum())
    slopes = torch.func.vmap(one, (None, 0))(own, x)
    weight = float(sum(slope.norm() for slope in slopes.values()))
    backward(weight * F.mse_loss(model(x), y))


def graph_of_a_backward(model: Any, module: Any, x: Any, y: Any, backward: Backward) -> None:
    loss = F.mse_loss(model(x), y)
    (loss / WORLD if model is module else loss).backward(create_graph=True)
    backward(F.mse_loss(model(x), y))


LOOPS = [
    *(penalty_in_one_backward, penalty_in_a_backward_of_its_own),
    *(penalty_waits_for_another_backward, penalty_goes_back_twice, penalty_of_a_part),
    *(penalty_through_checkpoints, penalty_on_an_intermediate, hessian_vector_product),
    *(product_of_one_layer, saliency_then_training, adversarial_examples, something_noted_inside),
    *(only_what_was_noted_inside, second_order_backward, vmapped, vmapped_block),
    *(functional_penalty, forward_mode, jacobians, gradients_of_samples, graph_of_a_backward),
]


IN_TURN = {"stage": 3, "stage3_param_persistence_threshold": 0}
AHEAD = {**IN_TURN, "overlap_comm": True}
IN_FORWARD = {"stage": 2, "overlap_param_gather": True, "overlap_comm": True}


def by_engine(loop: Callable[..., None], zero: dict[str, Any]) -> dict[str, torch.Tensor]:
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
        "zero_optimization": zero,
    }
    engine, *_ = drivetrain.initialize(model=Critic(), config=config)
    for step in range(STEPS):
        loop(engine, engine.module, *data(step, engine.job.rank), engine.backward)
        engine.step()
    if zero["stage"] == 3:
        assert not any(p.untyped_storage().nbytes() > 4 for p in engine.module.parameters())
    found = {name: value.clone() for name, value in engine.module_state_dict().items()}
    engine.destroy()
    return found


def by_torch(loop: Callable[..., None]) -> dict[str, torch.Tensor]:
    """One process does what all ranks do."""
    model = Critic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def backward(loss: torch.Tensor, **options: Any) -> None:
        (loss / WORLD).backward(**options)

    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(WORLD):
            loop(model, model, *data(step, rank), backward)
        optimizer.step()
    return model.state_dict()


def mistakes(ways: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with any loop, in any way to gather."""
    wrong = []
    for loop in LOOPS:
        expected = by_torch(loop)
        for zero in ways:
            found = by_engine(loop, zero)
            for name, value in expected.items():
                if not torch.allclose(found[name], value, rtol=1e-4, atol=1e-5):
                    off = float((found[name] - value).abs().max())
                    wrong.append(f"{loop.__name__}, {zero}: {name} is off by {off:.2e}")
    return wrong


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "gloo"])
def test_a_loop_that_differentiates_in_its_own_way_trains(shared: bool) -> None:
    ways = [IN_TURN] if shared else [IN_TURN, AHEAD, IN_FORWARD]
    without = {} if shared else {"DRIVETRAIN_DISABLE_PLUGINS": "drivetrain-cpu"}
    for wrong in run_distributed(mistakes, WORLD, ways, env=without):
        assert not wrong
