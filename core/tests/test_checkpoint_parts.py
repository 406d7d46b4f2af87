"""What a load leaves out has the value that its docs name, also in an engine that has trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError

MOMENTUM = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
ADAGRAD = {"type": "Adagrad", "params": {"lr": 0.1, "initial_accumulator_value": 0.3}}


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def make(optimizer: dict[str, Any], **changes: Any) -> Engine:
    config = {"train_micro_batch_size_per_gpu": 5, "gradient_clipping": 0.0, **changes}
    config["optimizer"] = optimizer
    return drivetrain.initialize(model=net(), config=config)[0]


def loss(module: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
    dtype = next(module.parameters()).dtype
    return (module(x.to(dtype)).float() - x.sum(1, keepdim=True)).square().mean()


def train(engine: Engine, steps: range) -> None:
    for step in steps:
        engine.backward(loss(engine, step))
        engine.step()


def distance(engine: Engine, module: nn.Module) -> float:
    pairs = zip(engine.module.parameters(), module.parameters(), strict=True)
    return max((a.detach().double() - b.detach().double()).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("left_out", ["load_optimizer_states", "load_module_only"])
@pytest.mark.parametrize(
    ("optimizer", "reference"),
    [
        (MOMENTUM, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (ADAGRAD, lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.3)),
        (
            {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.0}},
            lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0),
        ),
        ({"type": "NAdam", "params": {"lr": 0.1}}, lambda p: torch.optim.NAdam(p, lr=0.1)),
    ],
    ids=["momentum", "Adagrad", "AdamW", "NAdam"],
)
def test_optimizer_states_start_fresh_from_the_loaded_weights(
    tmp_path: Path, optimizer: dict[str, Any], reference: Any, left_out: str
) -> None:
    engine = make(optimizer, checkpoint={})
    train(engine, range(3))
    engine.save_checkpoint(tmp_path)
    module = copy.deepcopy(net())
    module.load_state_dict(engine.module.state_dict())
    train(engine, range(3, 6))
    engine.load_checkpoint(tmp_path, **{left_out: left_out == "load_module_only"})
    assert engine.global_steps == (6 if left_out == "load_module_only" else 3)
    train(engine, range(6, 9))
    plain = reference(module.parameters())
    for step in range(6, 9):
        plain.zero_grad()
        loss(module, step).backward()
        plain.step()
    assert distance(engine, module) < 1e-5
    engine.destroy()


def test_masters_are_made_of_the_loaded_parameters(tmp_path: Path) -> None:
    engine = make(MOMENTUM, bf16={"enabled": True})
    train(engine, range(2))
    engine.save_checkpoint(tmp_path)
    train(engine, range(2, 5))
    engine.load_checkpoint(tmp_path, load_module_only=True)
    found = {(f.name, f.kind): f.read().float() for f in engine.states.fragments()}
    for name, kind in found:
        if kind == "master":
            assert torch.equal(found[name, kind], found[name, "parameter"])
        if kind == "momentum_buffer":
            assert not found[name, kind].any()
    engine.destroy()


@pytest.mark.parametrize("module_only", [False, True])
def test_a_window_begins_with_a_load(tmp_path: Path, module_only: bool) -> None:
    plain = {"type": "SGD", "params": {"lr": 0.1}}
    engine = make(plain, gradient_accumulation_steps=2)
    engine.save_checkpoint(tmp_path)
    engine.backward(loss(engine, 0) * 100)
    engine.step()
    assert engine.micro_steps == 1
    engine.load_checkpoint(tmp_path, load_module_only=module_only)
    assert engine.micro_steps == 0
    for step in (1, 2):
        engine.backward(loss(engine, step))
        engine.step()
    assert engine.global_steps == 1
    module = net()
    ((loss(module, 1) + loss(module, 2)) / 2).backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.1 * parameter.grad
    assert distance(engine, module) < 1e-6
    engine.destroy()


def test_a_loss_that_was_no_number_is_forgotten(tmp_path: Path) -> None:
    engine = make(MOMENTUM)
    train(engine, range(1))
    engine.save_checkpoint(tmp_path)
    engine.backward(loss(engine, 1) * float("nan"))
    with pytest.raises(TrainingError, match="the loss of step 2 is nan"):
        engine.step()
    engine.load_checkpoint(tmp_path)
    train(engine, range(1, 3))
    assert engine.global_steps == 3
    engine.destroy()


def test_without_its_schedule_a_checkpoint_leaves_schedule_and_rates_alone(tmp_path: Path) -> None:
    warm_up = {"type": "WarmupLR", "params": {"warmup_num_steps": 50, "warmup_max_lr": 1.0}}
    engine = make(MOMENTUM, scheduler=warm_up)
    train(engine, range(2))
    engine.save_checkpoint(tmp_path)
    train(engine, range(2, 6))
    assert engine.optimizer is not None
    before = (engine.lr_scheduler.state_dict(), engine.optimizer.param_groups[0]["lr"])
    engine.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    assert engine.global_steps == 2
    assert (engine.lr_scheduler.state_dict(), engine.optimizer.param_groups[0]["lr"]) == before
    engine.load_checkpoint(tmp_path)
    assert engine.lr_scheduler.state_dict() != before[0]
    engine.destroy()


def test_hyper_parameters_that_no_schedule_of_the_engine_sets_are_the_optimizers(
    tmp_path: Path,
) -> None:
    engine = make(MOMENTUM)
    assert engine.optimizer is not None
    group = engine.optimizer.param_groups[0]
    group["lr"] = 0.25
    train(engine, range(1))
    engine.save_checkpoint(tmp_path)
    group["lr"] = 0.5
    engine.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    assert engine.optimizer.param_groups[0]["lr"] == 0.25
    engine.destroy()


def test_states_that_a_checkpoint_lacks_start_fresh_if_it_has_the_parameter(
    tmp_path: Path,
) -> None:
    source = make({"type": "SGD", "params": {"lr": 0.1}})
    train(source, range(2))
    source.save_checkpoint(tmp_path)
    source.destroy()
    engine = make(MOMENTUM)
    train(engine, range(4))
    engine.load_checkpoint(tmp_path, load_module_strict=False)
    kept = [f.read() for f in engine.states.fragments() if f.kind == "momentum_buffer"]
    assert len(kept) == 4
    assert not any(values.any() for values in kept)
    engine.destroy()


def test_random_streams_start_from_their_seeds_in_another_layout(tmp_path: Path) -> None:
    source = make(MOMENTUM)
    source.save_checkpoint(tmp_path)
    source.destroy()
    engine = make(MOMENTUM, bf16={"enabled": True})  # other tensors, so another layout
    first = torch.rand(3, generator=engine.job.random.generator("data"))
    engine.load_checkpoint(tmp_path, load_module_strict=False)
    assert torch.equal(torch.rand(3, generator=engine.job.random.generator("data")), first)
    engine.destroy()
