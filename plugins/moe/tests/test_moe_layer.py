"""The layer equals a dense loop over experts in one process, however experts are shared out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_experts import (
    EXPERTS,
    KINDS,
    RATE,
    TOKENS,
    WIDTH,
    Dense,
    Expert,
    Model,
    count_of,
    tokens,
    train_dense,
)
from drivetrain_moe import GroupedMLP, MoE

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import CheckpointError
from drivetrain.testing import run_distributed

STEPS = 3


def make(kind: str, ep: int, **changes: Any) -> Engine:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
    }
    return drivetrain.initialize(model=Model(kind, ep), config={**config, **changes})[0]


def step_through(engine: Engine, kind: str, begin: int, end: int) -> list[float]:
    shard, losses = engine.job.mesh.coordinate("dp"), []
    for step in range(begin, end):
        loss = engine(*tokens(step, shard, count_of(kind, shard)))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def held(engine: Engine) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def train(kinds: list[str], ep: int, changes: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for kind in kinds:
        engine = make(kind, ep, **changes)
        losses = step_through(engine, kind, 0, STEPS)
        with drivetrain.whole(engine.module):
            state = held(engine)
        found[kind] = losses, state
        engine.destroy()
    return found


def test_outside_of_a_job_the_layer_equals_a_dense_loop() -> None:
    for kind in KINDS:
        model, dense = Model(kind), Dense(kind)
        for one in (model, dense):
            one(*tokens(0, 0)).backward()
        expected = dict(dense.named_parameters())
        for name, parameter in model.named_parameters():
            wanted = expected[name].grad
            wanted = torch.zeros_like(parameter) if wanted is None else wanted
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-11, msg=kind)


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 2), (4, 4), (4, 1)])
def test_shared_out_experts_train_like_a_dense_loop(world: int, ep: int) -> None:
    kinds = list(KINDS) if (world, ep) in ((2, 2), (4, 4)) else ["dropless top-2", "grouped"]
    claim(kinds, world, ep, {})


def test_tokens_that_travel_in_halves_give_what_a_dense_loop_gives() -> None:
    claim(["top-2", "shared", "idle experts", "dropless top-1"], 2, 2, {"moe": {"halves": True}})


def claim(kinds: list[str], world: int, ep: int, changes: dict[str, Any]) -> None:
    ranks = run_distributed(train, world, kinds, ep, changes)
    for kind in kinds:
        losses, state = train_dense(kind, STEPS, world)
        got = torch.tensor([f[kind][0] for f in ranks], dtype=torch.float64).mean(0).tolist()
        assert got == pytest.approx(losses, rel=1e-9), kind
        seen = set()
        for found in ranks:
            for name, value in found[kind][1].items():
                torch.testing.assert_close(value, state[name], rtol=1e-8, atol=1e-10, msg=name)
            seen |= set(found[kind][1])
        assert seen == set(state)


# -- checkpoints -----------------------------------------------------------------------------------


def lowered(equal: bool, halves: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and gradients of tokens under autocast; all of them go to the first rank's expert."""
    torch.manual_seed(0)
    layer = MoE(WIDTH, GroupedMLP(EXPERTS, WIDTH, 8), EXPERTS, 2, drop_tokens=False)
    layer.gate.weight.data.zero_()[0, 0] = 3.0
    section = {"ep_size": 2, "halves": halves}
    plan = drivetrain.Plan.build({"train_batch_size": 2, "moe": section})
    with drivetrain.Job.open(plan) as job:
        engine = job.engine(layer, parameters=())
        if equal:
            layer.way = replace(layer.way, equal=True)
        x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
        x[:, 0] = 2.0
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = engine(x)[0]
        out.float().square().sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize(
    ("equal", "halves"),
    [
        (False, False),
        *(pytest.param(*ways, marks=pytest.mark.long) for ways in ((False, True), (True, False))),
    ],
)
def test_ranks_whose_experts_get_no_token_answer_in_the_dtype_of_autocast(
    equal: bool, halves: bool
) -> None:
    first, second = run_distributed(lowered, 2, equal, halves)
    for out, gradient in (first, second):
        assert out.dtype == torch.bfloat16
        assert out.abs().max() > 0.1
        assert torch.equal(out, first[0])
        if not equal:  # engines that serve have no gradients
            assert gradient.abs().max() > 0.1
            assert torch.equal(gradient, first[1])


def save(folder: str, kind: str) -> list[float]:
    engine = make(kind, 2)
    step_through(engine, kind, 0, 2)
    engine.save_checkpoint(folder)
    losses = step_through(engine, kind, 2, 4)
    engine.destroy()
    return losses


def load(folder: str, kind: str, ep: int) -> list[float]:
    engine = make(kind, ep)
    engine.load_checkpoint(folder)
    losses = step_through(engine, kind, 2, 4)
    engine.destroy()
    return losses


@pytest.mark.parametrize("kind", ["top-2", "grouped"])
def test_experts_saved_on_some_ranks_load_onto_others(kind: str, tmp_path: Path) -> None:
    straight = run_distributed(save, 4, str(tmp_path), kind)
    for ep in (1, 4):
        assert run_distributed(load, 4, str(tmp_path), kind, ep) == [
            pytest.approx(losses, rel=1e-9) for losses in straight
        ]


@pytest.mark.parametrize("kind", ["top-2", "grouped"])
def test_a_checkpoint_with_another_number_of_experts_is_refused(kind: str, tmp_path: Path) -> None:
    def engine_of(count: int) -> Engine:
        expert = GroupedMLP(count, WIDTH, 8) if kind == "grouped" else Expert()
        config = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": RATE}}}
        return drivetrain.initialize(model=MoE(WIDTH, expert, count), config=config)[0]

    engine = engine_of(4)
    engine.save_checkpoint(tmp_path)
    engine.destroy()
    for count in (8, 2):
        engine = engine_of(count)
        numbers = rf"has shape \[{count}, .*\] in the model, but \[4, .*\] in checkpoint"
        with pytest.raises(CheckpointError, match=numbers):
            engine.load_checkpoint(tmp_path)
        engine.destroy()
