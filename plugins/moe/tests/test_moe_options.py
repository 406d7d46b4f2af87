"""Noise of routers, room in evaluation, and layers that ask for other numbers of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_experts import EXPERTS, KINDS, RATE, WIDTH, Dense, Expert, Model, count_of, tokens
from drivetrain_moe import MoE, Routing, route
from torch import nn

import drivetrain
from drivetrain.testing import run_distributed

STEPS = 2


def test_jitter_multiplies_what_routers_see_in_training_alone() -> None:
    layer = MoE(WIDTH, Expert(), EXPERTS, k=1, noisy_gate_policy="Jitter", drop_tokens=False)
    x = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    noise = torch.empty_like(x).uniform_(0.99, 1.01)

    def scores(seen: torch.Tensor) -> torch.Tensor:
        return (seen @ layer.gate.weight.t()).softmax(-1)

    for training, seen in ((True, x * noise), (False, x)):
        torch.manual_seed(5)
        with torch.no_grad():
            output, _, counts = layer.train(training)(x)
            weight, expert = scores(seen).max(-1)
            parts = [layer.experts[str(e)](row) for e, row in zip(expert.tolist(), x, strict=True)]
            torch.testing.assert_close(output, weight.unsqueeze(1) * torch.stack(parts))
        assert counts.tolist() == torch.bincount(expert, minlength=EXPERTS).tolist()
    assert not torch.equal(scores(x), scores(x * noise))


def test_who_stays_is_drawn_for_one_expert_a_token_and_else_the_first() -> None:
    logits = torch.zeros(40, EXPERTS)
    logits[:, 1] = 1.0
    kept = []
    for seed, priority in ((0, None), (1, None), (0, None), (0, "position")):
        routing = Routing(EXPERTS, 1, capacity_factor=1.0, priority=priority)
        torch.manual_seed(seed)
        kept.append(sorted(route(logits, routing, training=True).token.tolist()))
    assert {len(tokens) for tokens in kept} == {40 // EXPERTS}
    assert kept[0] == kept[2]
    assert kept[0] != kept[1]
    assert kept[3] == list(range(40 // EXPERTS))


def test_evaluation_has_room_of_its_own() -> None:
    options: dict[str, Any] = {"capacity_factor": 0.5, "eval_capacity_factor": 4.0}
    layer = MoE(WIDTH, Expert(), EXPERTS, k=1, min_capacity=1, use_rts=False, **options)
    layer.gate.weight.data.zero_()
    x = torch.randn(16, WIDTH)
    with torch.no_grad():
        for training, computed in ((True, 2), (False, 16)):  # all choose the first expert
            output = layer.train(training)(x)[0]
            assert (output != 0).any(-1).tolist() == [True] * computed + [False] * (16 - computed)


# -- layers that ask for other numbers of ranks ----------------------------------------------------


class Several(nn.Module):
    """A loss of three layers, each with experts of its own."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({str(number): part for number, part in enumerate(parts)})

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([part(x, y) for part in self.parts.values()]).sum()


LAYERS = (("dropless top-2", 4), ("grouped", 2), ("dropless top-1", 1))


def train_several() -> dict[str, torch.Tensor]:
    model = Several(*(Model(kind, ep) for kind, ep in LAYERS))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
    }
    engine = drivetrain.initialize(model=model, config=config)[0]
    held = [len(engine.module.parts[name].moe.experts) for name in ("0", "2")]
    assert held == [EXPERTS // 4, EXPERTS]
    assert len(engine.module.parts["1"].moe.experts.up) == EXPERTS // 2
    for step in range(STEPS):
        engine.backward(engine(*tokens(step, engine.job.rank, 5 + engine.job.rank)))
        engine.step()
    found = engine.module_state_dict()
    engine.destroy()
    return found


def test_layers_share_out_experts_over_other_numbers_of_ranks() -> None:
    model = Several(*(Dense(kind) for kind, _ in LAYERS))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        losses = [model(*tokens(step, shard, 5 + shard)) for shard in range(4)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    expected = model.state_dict()
    for found in run_distributed(train_several, 4):
        assert set(found) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=name)


# -- every kind of routing at every stage ----------------------------------------------------------


def train_kinds(ep: int, stage: int) -> dict[str, dict[str, torch.Tensor]]:
    states = {}
    for kind in KINDS:
        engine = drivetrain.initialize(
            model=Model(kind, ep),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": 0.0,
                "optimizer": {"type": "SGD", "params": {"lr": RATE}},
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            },
        )[0]
        shard = engine.job.rank
        for step in range(STEPS):
            engine.backward(engine(*tokens(step, shard, count_of(kind, shard))))
            engine.step()
        states[kind] = engine.module_state_dict()
        engine.destroy()
    return states


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_every_kind_of_routing_trains_at_every_stage(world: int, ep: int, stage: int) -> None:
    pytest.importorskip("drivetrain_zero")
    ranks = run_distributed(train_kinds, world, ep, stage)
    for kind in KINDS:
        model = Dense(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for step in range(STEPS):
            losses = [model(*tokens(step, s, count_of(kind, s))) for s in range(world)]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
        expected = model.state_dict()
        for found in (states[kind] for states in ranks):
            assert set(found) == set(expected)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=name)
