"""Jobs on the C++ device whose states leave it and come back; each function runs on a rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from unittest.mock import patch

import torch
from device_memory import allocated
from drivetrain_offload import offload_states, reload_states, state_devices
from drivetrain_offload.on_demand.storages import PlacedStorage
from torch import nn
from warp_ranks import WarpWithRanks

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.engine.engine import Engine
from drivetrain.errors import DrivetrainError
from drivetrain.plan.registry import Registry
from drivetrain.states.whole import whole
from drivetrain.testing.models import tiny_gpt

MICRO_BATCH = 2


def start(config: Mapping[str, Any], module: nn.Module | None = None) -> Engine:
    registry = Registry.installed()
    registry.add("accelerators", WarpWithRanks.name, WarpWithRanks)
    module = module or tiny_gpt()
    engine, *_ = drivetrain.initialize(
        model=module,
        model_parameters=module.parameters(),
        config={"train_micro_batch_size_per_gpu": MICRO_BATCH, "accelerator": "warp", **config},
        registry=registry,
    )
    return engine


def loss_of(engine: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + Ranks.current().rank)
    tokens = torch.randint(64, (MICRO_BATCH, 9), generator=generator)
    tokens = tokens.to(next(engine.parameters()).device)
    loss: torch.Tensor = engine(tokens[:, :-1], tokens[:, 1:])
    return loss


def train(engine: Engine, steps: Iterable[int], between: Callable[[], object]) -> list[float]:
    losses = []
    for step in steps:
        for micro in range(engine.gradient_accumulation_steps()):
            loss = loss_of(engine, 10 * step + micro)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            del loss
            between()
    return losses


def undisturbed(config: Mapping[str, Any], steps: int) -> list[float]:
    engine = start(config)
    losses = train(engine, range(steps), lambda: None)
    engine.destroy()
    return losses


def interrupted(
    config: Mapping[str, Any], steps: int, include: list[str] | None, options: dict[str, Any]
) -> tuple[list[float], list[tuple[int, int, int]], list[dict[str, int]]]:
    """Losses; the device's bytes before, while and after states are away; what each call moved."""
    engine = start(config)
    memory, moved = [], []

    def away_and_back() -> None:
        before = allocated()
        moved.append(offload_states(engine, include, **options))
        between = allocated()
        reload_states(engine)
        memory.append((before, between, allocated()))

    losses = train(engine, range(steps), away_and_back)
    engine.destroy()
    return losses, memory, moved


def generates_without(config: Mapping[str, Any], include: list[str]) -> list[float]:
    """Losses of a training between whose steps the model is used while states are away."""
    engine = start(config)

    def generate() -> None:
        with torch.no_grad():
            wanted = loss_of(engine, 77).item()
            offload_states(engine, include)
            assert loss_of(engine, 77).item() == wanted
        reload_states(engine)

    losses = train(engine, range(3), generate)
    engine.destroy()
    return losses


def steps_after_a_backward_without(config: Mapping[str, Any]) -> list[float]:
    """Optimizer states and masters are away during every forward and backward."""
    engine, losses = start(config), []
    for step in range(3):
        offload_states(engine, ["optim_states"])
        offload_states(engine, ["hp_params"])
        loss = loss_of(engine, 10 * step)
        engine.backward(loss)
        reload_states(engine)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


def refusals(config: Mapping[str, Any]) -> dict[str, str]:
    """Use of states that are away -> the error."""
    engine = start(config)
    train(engine, range(1), lambda: None)
    graph = loss_of(engine, 5)
    offload_states(engine)
    parameter = next(engine.module.parameters())
    uses: dict[str, Callable[[], object]] = {
        "forward": lambda: loss_of(engine, 1),
        "module": lambda: loss_of(engine.module, 1),
        "submodule": lambda: engine.module.norm(torch.ones(1, 32, device="warp")),
        "engine.backward": lambda: engine.backward(graph),
        "backward": lambda: graph.backward(),  # type: ignore[no-untyped-call]
        "step": engine.step,
        "rebuild": engine.rebuild,
        "zero_grad": engine.zero_grad,
        "state_dict": engine.module.state_dict,
        "module_state_dict": engine.module_state_dict,
        "whole": lambda: whole(parameter).__enter__(),
        "write": lambda: engine.states.fragments()[0].write(torch.zeros(1)),
    }
    found = {name: _error(use) for name, use in uses.items()}
    assert torch.isnan((parameter * 2).cpu()).all()
    reload_states(engine)
    train(engine, range(2, 3), lambda: None)
    engine.destroy()
    return found


def _error(use: Callable[[], object]) -> str:
    try:
        use()
    except DrivetrainError as error:
        return str(error)
    return ""


def refusals_by_kind(config: Mapping[str, Any]) -> dict[str, set[str]]:
    """Kind that is away -> the uses that are refused."""
    engine = start(config)
    train(engine, range(1), lambda: None)

    def evaluate() -> None:
        with torch.no_grad():
            loss_of(engine, 1)

    uses: dict[str, Callable[[], object]] = {
        "evaluate": evaluate,
        "forward": lambda: loss_of(engine, 1),
        "backward": lambda: engine.backward(loss_of(engine, 1)),
        "zero_grad": engine.zero_grad,
        "step": engine.step,
        "rebuild": engine.rebuild,
        "refresh": lambda: engine.states.refresh(),
    }
    found = {}
    for kind in ("optim_states", "hp_params", "lp_params", "lp_grads"):
        offload_states(engine, [kind])
        found[kind] = {name for name, use in uses.items() if _error(use)}
        reload_states(engine)
    engine.destroy()
    return found


def saved_while_away(config: Mapping[str, Any], folder: str) -> tuple[list[float], list[float]]:
    """Losses after a save, and after loading it into another engine; states are away at the save.

    Loading is refused, and changes nothing, while they are.
    """
    engine = start(config)
    train(engine, range(2), lambda: None)
    offload_states(engine)
    engine.save_checkpoint(folder)
    error = _error(lambda: engine.load_checkpoint(folder))
    assert "reload_states(engine)" in error, error
    reload_states(engine)
    first = train(engine, range(2, 4), lambda: None)
    engine.destroy()
    other = start(config)
    other.load_checkpoint(folder)
    second = train(other, range(2, 4), lambda: None)
    other.destroy()
    return first, second


def places(config: Mapping[str, Any]) -> list[dict[str, set[str]]]:
    engine = start(config)
    found = [state_devices(engine)]
    offload_states(engine, ["optim_states", "hp_params"])
    found.append(state_devices(engine))
    offload_states(engine)
    found.append(state_devices(engine))
    again = offload_states(engine)
    assert set(again.values()) == {0}
    reload_states(engine)
    reload_states(engine)
    found.append(state_devices(engine))
    engine.destroy()
    return found


def destroyed_while_away(config: Mapping[str, Any]) -> tuple[list[list[float]], list[list[float]]]:
    """The values of some parameters before, and after the engine has let go of the module."""
    engine = start(config)
    train(engine, range(1), lambda: None)
    with whole(engine.module):
        before = [p.detach().flatten()[:4].cpu().tolist() for p in engine.module.parameters()]
    offload_states(engine)
    engine.states.detach()  # what destroy() does before it closes the job
    with whole(engine.module):
        after = [p.detach().flatten()[:4].cpu().tolist() for p in engine.module.parameters()]
    engine.destroy()
    return before, after


def without_host_memory(config: Mapping[str, Any]) -> tuple[str, str, list[float]]:
    """Errors when memory cannot be had on either side, and losses of a training around them."""
    engine = start(config)
    losses = train(engine, range(1), lambda: None)
    accelerator, before = engine.job.accelerator, allocated()
    pinned = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        if len(pinned) == 2:
            raise RuntimeError("cannot lock pages")
        pinned.append(tensor)
        return tensor

    accelerator.pin_memory = pin  # type: ignore[method-assign]
    away = _error(lambda: offload_states(engine))
    assert allocated() == before
    losses += train(engine, range(1, 2), lambda: None)
    offload_states(engine, pin_memory=False)
    between = allocated()
    torch.warp.limit_memory(between + 8192)  # type: ignore[attr-defined]
    back = _error(lambda: reload_states(engine))
    torch.warp.limit_memory()  # type: ignore[attr-defined]
    assert allocated() == between
    assert _error(engine.step)
    reload_states(engine)
    losses += train(engine, range(2, 3), lambda: None)
    engine.destroy()
    return away, back, losses


def shared_with_a_client(config: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    """What is moved, and said, when the memory of some moments cannot be freed."""
    engine = start(config)
    train(engine, range(1), lambda: None)
    held = [f.read().untyped_storage() for f in engine.states.fragments() if f.kind == "exp_avg"]
    kept = {storage._cdata for storage in held}
    owner, said = logging.getLogger("drivetrain.offload"), []
    owner.addFilter(lambda record: said.append(record.getMessage()) is None)
    resizable = property(lambda self: self.storage._cdata not in kept)
    with patch.object(PlacedStorage, "resizable", resizable):
        moved = offload_states(engine)
        assert all(storage.nbytes() for storage in held)
        assert state_devices(engine)["optim_states"] == {"device", "host"}
    reload_states(engine)
    engine.destroy()
    return moved, said


def read_while_away(config: Mapping[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Whole states of a parameter, read while they are on the device and while they are not."""
    from drivetrain_zero import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine = start(config)
    train(engine, range(2), lambda: None)
    parameter = engine.module.blocks[0].up.weight

    def states() -> list[torch.Tensor]:
        found = safe_get_full_fp32_param(parameter)
        moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        assert found is not None
        assert moment is not None
        return [found.cpu(), moment.cpu()]

    before = states()
    offload_states(engine)
    between = states()
    reload_states(engine)
    engine.destroy()
    return before, between
