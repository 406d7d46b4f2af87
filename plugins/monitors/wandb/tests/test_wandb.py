"""A run of Weights & Biases holds the numbers of training, which goes on without one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from drivetrain_wandb import WandbWriter, WeightsAndBiases

import drivetrain
from drivetrain.monitor import Event, write_events
from drivetrain.plan.registry import Registry
from drivetrain.testing import PluginConformance, data, run_distributed
from drivetrain.testing.models import mlp


@pytest.fixture(scope="module", autouse=True)
def _temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What wandb makes at its import it removes at exit, which ranks do not come to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("wandb")))
        yield


class TestWeightsAndBiases(PluginConformance):
    plugin = WeightsAndBiases
    config = {"wandb": {"enabled": True}}


def train(section: dict[str, Any], steps: int = 3) -> None:
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "gradient_clipping": 100.0,
        "wandb": {"enabled": True, **section},
    }
    engine, *_ = drivetrain.initialize(
        model=mlp(), config=config, registry=Registry.installed().with_plugins(WeightsAndBiases)
    )
    inputs, targets = data.vectors(4)
    share = engine.train_micro_batch_size_per_gpu()
    rows = slice(engine.job.rank * share, (engine.job.rank + 1) * share)
    for _ in range(steps):
        engine.backward(engine(inputs[rows], targets[rows]))
        engine.step()
    write_events(engine, [("accuracy", 0.25, engine.global_samples)])
    engine.destroy()
    engine.job.close()


class Run:
    """What a run is told."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def recorded(section: dict[str, Any]) -> tuple[dict[str, Any], Run]:
    told: dict[str, Any] = {}
    run = Run()

    def init(**arguments: Any) -> Run:
        told.update(arguments)
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb, "init", init)
        train(section)
    return told, run


def test_a_run_is_told_all_values_of_a_step_at_once_and_the_config() -> None:
    section = {"project": "gpt", "team": "research", "group": "small", "name": "first"}
    ((told, run),) = run_distributed(recorded, 1, section)
    wanted = {"project": "gpt", "entity": "research", "group": "small", "name": "first"}
    assert {key: told[key] for key in wanted} == wanted
    assert told["config"]["train_batch_size"] == 4
    assert [samples for samples, _ in run.logged] == [4, 8, 12]
    assert run.logged[-1][1]["accuracy"] == 0.25
    assert run.logged[0][1]["Train/Samples/lr"] == 0.5
    assert run.finished


def without_login(folder: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", folder)  # no login there
        patch.setenv("WANDB_MODE", "online")
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers
        patch.delenv("WANDB_API_KEY", raising=False)
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("drivetrain.monitor").addHandler(handler)
        train({})
        return said


def test_without_a_login_it_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    (said,) = run_distributed(without_login, 1, str(tmp_path))
    assert len(said) == 1
    assert said[0].startswith("wandb shows nothing more, training goes on: ")


def offline(folder: str) -> None:
    wandb.teardown()  # it keeps what the variables were when it was first used
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train({"mode": "offline", "project": "gpt"})


def test_offline_the_run_lies_in_a_file(tmp_path: Path) -> None:
    run_distributed(offline, 1, str(tmp_path))
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"Train/Samples/train_loss" in file.read_bytes()


def test_values_of_one_place_are_one_row() -> None:
    run = Run()
    WandbWriter(run).write([Event("a", 1.0, 4), Event("b", 2.0, 4), Event("a", 3.0, 8)])
    assert run.logged == [(4, {"a": 1.0, "b": 2.0}), (8, {"a": 3.0})]
