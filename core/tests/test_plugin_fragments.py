"""A plugin's tensors that are cut over ranks are saved in parts and load in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import Fragment, Plugin, hookimpl
from drivetrain.engine.engine import Engine
from drivetrain.errors import CheckpointError
from drivetrain.plan.registry import Registry
from drivetrain.states.device_home import tensor_fragment
from drivetrain.testing import run_distributed
from drivetrain.testing.models import mlp

ROWS, COLUMNS = 7, 3

_tables: WeakKeyDictionary[Engine, torch.Tensor] = WeakKeyDictionary()


class LossTable(Plugin):
    """Remembers a number per sample and epoch; every data shard keeps those of its samples."""

    name = "loss_table"
    prefix = "loss_table"

    @hookimpl
    def state_fragments(self, engine: Engine) -> Sequence[Fragment]:
        begin, end = own_part(engine)
        table = _tables.setdefault(engine, torch.zeros(end - begin))
        return [
            tensor_fragment(
                f"{self.prefix}/losses",
                "anything",
                table,
                owner=True,
                shape=(ROWS, COLUMNS),
                start=begin,
            )
        ]


class Misnamed(LossTable):
    prefix = "losses"


def own_part(engine: Engine) -> tuple[int, int]:
    """Unequal parts whose ends lie anywhere in a row."""
    shards, shard = engine.job.mesh.size("dp"), engine.job.mesh.coordinate("dp")
    cuts = [ROWS * COLUMNS * n * (n + 1) // (shards * (shards + 1)) for n in range(shards + 1)]
    return cuts[shard], cuts[shard + 1]


def make(plugin: type[Plugin] | None) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=mlp(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "SGD"},
            "plugins": {"loss_table": True} if plugin else {},
        },
        registry=Registry.installed().with_plugins(*([plugin] if plugin else [])),
    )
    return engine


def save(folder: str, plugin: type[Plugin] | None) -> None:
    engine = make(plugin)
    begin, end = own_part(engine)
    _tables[engine] = torch.arange(begin, end).float() + 100
    engine.save_checkpoint(folder)
    engine.destroy()


def load(folder: str, **options: Any) -> list[float]:
    """This rank's part after a load."""
    engine = make(LossTable)
    _tables[engine] = torch.full((own_part(engine)[1] - own_part(engine)[0],), -1.0)
    engine.load_checkpoint(folder, **options)
    found: list[float] = _tables[engine].tolist()
    engine.destroy()
    return found


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 3), (3, 2), (2, 2), (3, 1)])
def test_parts_are_put_together_and_cut_anew(saved_on: int, loaded_on: int, tmp_path: Path) -> None:
    run_distributed(save, saved_on, str(tmp_path), LossTable)
    parts = run_distributed(load, loaded_on, str(tmp_path))
    assert [number for part in parts for number in part] == [
        100.0 + n for n in range(ROWS * COLUMNS)
    ]


def load_in_three_ways(folder: str) -> list[list[float]]:
    ways: list[dict[str, Any]] = [
        {},
        {"load_module_only": True},
        {"load_optimizer_states": False},
    ]
    return [load(folder, **options) for options in ways]


def test_a_load_of_the_module_alone_leaves_them_as_they_are(tmp_path: Path) -> None:
    run_distributed(save, 1, str(tmp_path), LossTable)
    (everything, module, no_optimizer) = run_distributed(load_in_three_ways, 1, str(tmp_path))[0]
    assert everything == no_optimizer == [100.0 + n for n in range(ROWS * COLUMNS)]
    assert set(module) == {-1.0}


def test_a_checkpoint_from_before_the_plugin_loads_and_leaves_them_as_they_are(
    tmp_path: Path,
) -> None:
    run_distributed(save, 2, str(tmp_path), None)
    for part in run_distributed(load, 2, str(tmp_path)):
        assert set(part) == {-1.0}


def save_misnamed(folder: str) -> str:
    engine = make(Misnamed)
    try:
        engine.save_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()
    return f"saved on {Ranks.current().rank}"


def test_a_name_that_is_not_the_plugins_is_refused_on_every_rank(tmp_path: Path) -> None:
    for message in run_distributed(save_misnamed, 2, str(tmp_path)):
        assert "a plugin has a state fragment 'losses/losses'" in message
        assert "must begin with the plugin's and a slash: loss_table" in message
