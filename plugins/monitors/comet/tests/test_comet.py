"""An experiment of Comet is told the numbers of training; the client here is a stand-in."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from drivetrain_comet import Comet, CometWriter

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.job.job import _open_jobs
from drivetrain.monitor import Event, write_events
from drivetrain.plan.registry import Registry
from drivetrain.testing import PluginConformance, data, run_distributed
from drivetrain.testing.models import mlp


class TestComet(PluginConformance):
    plugin = Comet
    config = {"comet": {"enabled": True}}


def train(section: dict[str, Any], steps: int = 3) -> None:
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "gradient_clipping": 100.0,
        "comet": {"enabled": True, **section},
    }
    engine, *_ = drivetrain.initialize(
        model=mlp(), config=config, registry=Registry.installed().with_plugins(Comet)
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


class Experiment:
    """What an experiment is told."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, float, int]] = []
        self.name = ""
        self.parameters: dict[str, Any] = {}
        self.ended = False

    def set_name(self, name: str) -> None:
        self.name = name

    def log_parameters(self, parameters: dict[str, Any], nested_support: bool) -> None:
        assert nested_support
        self.parameters = parameters

    def log_metric(self, name: str, value: float, step: int) -> None:
        self.metrics.append((name, value, step))

    def end(self) -> None:
        self.ended = True


def recorded(section: dict[str, Any]) -> tuple[dict[str, Any], Experiment]:
    told: dict[str, Any] = {}
    experiment = Experiment()

    def start(**arguments: Any) -> Experiment:
        told.update(arguments)
        return experiment

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "comet_ml", SimpleNamespace(start=start))
        train(section)
    return told, experiment


def test_an_experiment_is_told_values_in_their_interval_and_no_key_in_the_config() -> None:
    section = {
        "project": "gpt",
        "api_key": "secret",
        "experiment_name": "first",
        "samples_log_interval": 8,
    }
    ((told, experiment),) = run_distributed(recorded, 1, section)
    assert (told["project"], told["api_key"]) == ("gpt", "secret")
    assert experiment.name == "first"
    assert experiment.parameters["train_batch_size"] == 4
    assert "api_key" not in experiment.parameters["comet"]
    rates = [step for name, _, step in experiment.metrics if name == "Train/Samples/lr"]
    assert rates == [4, 12]
    assert experiment.ended


def test_an_interval_begins_when_a_value_is_sent() -> None:
    experiment = Experiment()
    writer = CometWriter(experiment, 10)
    for samples in (4, 8, 14, 23, 24, 40):
        writer.write([Event("a", 1.0, samples)])
    assert [step for *_, step in experiment.metrics] == [4, 14, 24, 40]


def refused() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "comet_ml", None)
        with pytest.raises(ConfigError) as caught:
            train({})
    for job in list(_open_jobs):
        job.close()
    return str(caught.value)


def test_a_missing_client_is_named_with_what_to_install() -> None:
    (message,) = run_distributed(refused, 1)
    assert "pip install 'drivetrain-comet[client]'" in message
