"""Whole numbers that a script's optimizer keeps stay exact, and no device is asked for them."""

from __future__ import annotations

import pytest
import torch

from drivetrain.errors import TrainingError
from drivetrain.optimization.factory import TorchRule
from drivetrain.states.device_home import FlatStates
from drivetrain.testing.rules import place


class Whole(torch.optim.Optimizer):
    """Keeps whole numbers, of which one becomes a fraction when ``halves``."""

    def __init__(self, params, lr=0.1, halves=99):
        super().__init__(params, {"lr": lr, "halves": halves})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(
                        turns=0, seen=torch.tensor([0]), wide=torch.zeros((), dtype=torch.float64)
                    )
                state["turns"] += 1
                state["seen"] += 1
                state["wide"] += 1
                if state["turns"] == group["halves"]:
                    state["turns"] /= 2
                p.sub_(p.grad * group["lr"])


def test_whole_numbers_go_on_where_float32_would_stop():
    rule = TorchRule(Whole)
    home, *_ = place(rule, {"a": torch.ones(3)}, padding=0)
    home.update(torch.ones(3), rule.defaults, 1.0)
    kinds = {"turns": torch.int64, "seen": torch.int64, "wide": torch.float64}
    counters = [f for f in home.fragments() if f.kind in kinds]
    assert {(f.kind, f.dtype) for f in counters} == set(kinds.items())
    for fragment in counters:
        fragment.write(torch.full_like(fragment.read(), 2**24))
    for _ in range(2):
        home.update(torch.ones(3), rule.defaults, 1.0)
    for fragment in counters:
        assert set(fragment.read().tolist()) == {2**24 + 2}


def test_a_device_is_asked_for_numbers_only_after_a_load():
    """On the meta device, to ask is an error."""
    rule = TorchRule(Whole)
    home, *_ = place(rule, {"a": torch.ones(3)}, padding=0)
    flat = torch.ones(3, device="meta")
    states = FlatStates(home.spec, flat.device)
    states.fill(flat)
    for step in (1, 2, 3):
        states.update(flat, flat.clone(), rule.defaults, 1.0, step)
    states.tensors["turns"].copy_(states.tensors["turns"].clone())
    with pytest.raises(RuntimeError, match="meta"):
        states.update(flat, flat.clone(), rule.defaults, 1.0, 4)


def test_a_whole_number_that_becomes_a_fraction_is_refused():
    rule = TorchRule(Whole, {"halves": 5})
    home, *_ = place(rule, {"a": torch.ones(3)}, padding=0)
    for _ in range(4):
        home.update(torch.ones(3), rule.defaults, 1.0)
    with pytest.raises(TrainingError, match=r"a state 'turns' that was a whole number .* 2.5 now"):
        home.update(torch.ones(3), rule.defaults, 1.0)
