"""Which experts that are modules are computed in one pass, and which are called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dense_experts import WIDTH, Expert
from drivetrain_moe.experts import ExpertList
from torch import nn
from torch.nn import functional

COUNTS = torch.tensor([3, 0, 4, 2])
CALLS: list[int] = []


class Counted(Expert):
    """Tells each time it is called with more than the few tokens by which it is recognised."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CALLS.append(len(x))
        return super().forward(x)


class Noting(Expert):
    """Notes what it sees."""

    seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return super().forward(x)


class Dropping(Expert):
    """Drops all so rarely that random tokens do not show it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = not self.training or bool(torch.rand(()) > 1e-9)
        return super().forward(x) if kept else torch.zeros_like(x)


class Twice(Expert):
    """An attribute of each expert says what it computes."""

    times = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.times * super().forward(x)


def experts_of(
    kind: type[Expert] = Counted, activation: Callable[[torch.Tensor], torch.Tensor] = torch.relu
) -> ExpertList:
    torch.manual_seed(0)
    experts = ExpertList(kind(activation), len(COUNTS)).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(int(COUNTS.sum()), WIDTH, dtype=torch.float64, generator=generator)
    return x.requires_grad_()


def is_called(experts: ExpertList) -> bool:
    """Whether experts are called with their tokens; the answers are right in both cases."""
    x = rows()
    got = experts(x, COUNTS)
    CALLS.clear()
    assert torch.equal(got, experts(x, COUNTS))
    called = COUNTS.tolist() == CALLS
    assert called or not CALLS
    pieces = zip(experts.values(), torch.split(x, COUNTS.tolist()), strict=True)
    expected = torch.cat([expert(piece) for expert, piece in pieces])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, *experts.parameters()]
    gradient = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad(got, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    return called


def test_two_layers_with_a_known_activation_are_not_called() -> None:
    known = (torch.relu, functional.silu, functional.gelu, nn.GELU(approximate="tanh"))
    assert not any(is_called(experts_of(activation=activation)) for activation in known)
    assert all(is_called(experts_of(activation=other)) for other in (torch.tanh, functional.mish))


def test_what_hooks_on_to_an_expert_or_takes_its_place_is_called() -> None:
    experts = experts_of()
    assert not is_called(experts)
    hook = experts["2"].down.register_forward_hook(lambda module, x, y: 2 * y)
    assert is_called(experts)
    hook.remove()
    assert not is_called(experts)
    experts["1"].forward = experts["1"].forward
    assert is_called(experts)
    del experts["1"].forward
    experts["3"].up.weight = nn.Parameter(torch.randn(8, WIDTH, dtype=torch.float64))
    assert not is_called(experts)
    experts["3"].up = nn.Sequential(experts["3"].up, nn.Linear(8, 8, dtype=torch.float64))
    assert is_called(experts)
    CALLS.clear()
    with torch.autocast("cpu", torch.bfloat16):
        experts_of()(rows(), COUNTS)
    assert COUNTS.tolist() == CALLS


def test_what_an_attribute_says_holds_from_then_on() -> None:
    experts = experts_of(Twice)
    x = rows()
    once = experts(x, COUNTS)
    for expert in experts.values():
        expert.times = 2.0
    torch.testing.assert_close(experts(x, COUNTS), 2 * once)
    experts["0"].activation = torch.tanh
    assert not torch.allclose(experts(x, COUNTS)[:3], 2 * once[:3])


@pytest.mark.parametrize("kind", [Noting, Dropping])
def test_experts_that_draw_or_note_what_they_see_are_called(kind: type[Expert]) -> None:
    experts, state = experts_of(kind), torch.get_rng_state()
    found = experts._ordinary.compute(list(experts.values()), rows(), COUNTS.tolist())
    assert found is None
    assert torch.equal(torch.get_rng_state(), state)
    experts.eval()
    found = experts._ordinary.compute(list(experts.values()), rows(), COUNTS.tolist())
    assert (found is None) is (kind is Noting)
    assert all(getattr(expert, "seen", 0) == 0 for expert in experts.values())


def test_an_expert_unlike_the_first_has_all_of_them_called() -> None:
    experts = experts_of(Twice)
    experts["2"].times = 3.0
    assert experts._ordinary.compute(list(experts.values()), rows(), COUNTS.tolist()) is None


def test_gradients_of_gradients_are_those_of_modules() -> None:
    experts = experts_of(activation=functional.silu)
    inputs = (rows(), *experts.parameters())
    assert not is_called(experts)
    assert torch.autograd.gradgradcheck(lambda x, *_: experts(x, COUNTS), inputs, fast_mode=True)
