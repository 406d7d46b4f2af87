"""Engines of plain data parallelism read in place what another engine of the process trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed

SERVING: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0}
CONFIG = {**SERVING, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
BF16 = {"bf16": {"enabled": True}}


def trunk(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def engine_of(module: nn.Module, config: dict[str, Any], parameters: Any = None) -> Engine:
    return drivetrain.initialize(model=module, model_parameters=parameters, config=config)[0]


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(step))


def close(*engines: Engine) -> None:
    for engine in engines:
        engine.destroy()
        engine.job.close()


def step(engine: Engine, number: int) -> None:
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(batch(number).to(dtype)).square().mean())
    engine.step()


def read_beside_training() -> None:
    """Batch statistics are the owner's, too: another engine's ranks do not overwrite them."""
    module, plain = trunk(), trunk()
    owner = engine_of(module, CONFIG)
    with torch.no_grad():
        module[1].running_mean += owner.job.rank
    reader = engine_of(module, SERVING)
    assert module[1].running_mean.unique().tolist() == [float(owner.job.rank)]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    memory = [p.data_ptr() for p in module.parameters()]
    for number in range(3):
        step(owner, number)
        plain(batch(number)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(reader(batch(9)), plain(batch(9)))
    assert [p.data_ptr() for p in module.parameters()] == memory
    reader.destroy()
    step(owner, 3)
    close(reader, owner)


def write_masters_through_a_reader() -> None:
    module, plain = trunk().to(torch.bfloat16), trunk(5)
    owner = engine_of(module, {**CONFIG, **BF16})
    reader = engine_of(module, {**SERVING, **BF16})
    reader.load_module_state_dict(trunk(5).state_dict())
    masters = {f.name: f.read() for f in owner.states.fragments() if f.kind == "master"}
    whole = dict(plain.named_parameters())
    assert "0.weight" in masters
    for name, master in masters.items():
        expected = whole[name].detach().to(torch.bfloat16).float().flatten()
        torch.testing.assert_close(master, expected, msg=name)
    step(owner, 0)  # which takes its masters
    close(reader, owner)


def checkpoint_of_a_reader(folder: str) -> None:
    module = trunk()
    outer = nn.Sequential(module, nn.Linear(4, 2))
    owner = engine_of(module, CONFIG)
    second = engine_of(outer, CONFIG, outer[1].parameters())
    step(second, 0)
    saved = copy.deepcopy(outer.state_dict())
    second.save_checkpoint(folder)
    owner.zero_grad()
    step(owner, 1)
    step(second, 2)
    kept = copy.deepcopy(outer[0].state_dict())
    second.load_checkpoint(folder)
    for name, value in outer.state_dict().items():
        inside = name.removeprefix("0.")
        wanted = kept[inside] if name.startswith("0.") else saved[name]
        torch.testing.assert_close(value, wanted, msg=name)
    close(second, owner)
    alone = nn.Sequential(trunk(3), nn.Linear(4, 2))
    third = engine_of(alone, SERVING)
    third.load_checkpoint(folder, load_module_only=True)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(value, saved[name], msg=name)
    close(third)


# -- claims ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_an_engine_reads_what_another_trains(world: int) -> None:
    run_distributed(read_beside_training, world)


def test_masters_follow_what_is_written_through_a_reader() -> None:
    run_distributed(write_masters_through_a_reader, 2)


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_has_what_is_lent_and_a_load_leaves_it_alone(
    tmp_path: Path, world: int
) -> None:
    run_distributed(checkpoint_of_a_reader, world, str(tmp_path))


def test_another_precision_than_the_owners_is_refused_by_name() -> None:
    module = trunk()
    owner = engine_of(module, CONFIG)
    with pytest.raises(ConfigError, match=r"parameter 0\.\w+ is lent by another engine .*float32"):
        engine_of(module, {**SERVING, **BF16})
    assert module[1].running_mean.dtype is torch.float32
    close(owner)


def test_an_engine_may_be_built_to_train_nothing() -> None:
    module = trunk()
    owner = engine_of(module, CONFIG)
    reader = owner.job.engine(module, parameters=())
    assert reader.optimizer is None
    step(owner, 0)
    reader.destroy()
    close(owner)
