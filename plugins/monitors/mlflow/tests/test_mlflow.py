"""A run of MLflow is told the numbers of training; the client here is a stand-in."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from drivetrain_mlflow import MLflow, MLflowWriter

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.job.job import _open_jobs
from drivetrain.monitor import Event, write_events
from drivetrain.plan.registry import Registry
from drivetrain.testing import PluginConformance, data, run_distributed
from drivetrain.testing.models import mlp


class TestMLflow(PluginConformance):
    plugin = MLflow
    config = {"mlflow": {"enabled": True}}


def train(section: dict[str, Any], steps: int = 3) -> None:
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "gradient_clipping": 100.0,
        "mlflow": {"enabled": True, **section},
    }
    engine, *_ = drivetrain.initialize(
        model=mlp(), config=config, registry=Registry.installed().with_plugins(MLflow)
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


class Metric(NamedTuple):
    key: str
    value: float
    timestamp: int
    step: int


class Client:
    """What a tracking server is told."""

    def __init__(self, tracking_uri: str | None = None) -> None:
        self.tracking_uri = tracking_uri
        self.experiments: list[str] = []
        self.runs: list[tuple[str, str | None]] = []
        self.parameters: dict[str, str] = {}
        self.batches: list[list[Metric]] = []
        self.ended: list[str] = []

    def get_experiment_by_name(self, _name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        self.experiments.append(name)
        return "7"

    def create_run(self, experiment: str, run_name: str | None) -> SimpleNamespace:
        self.runs.append((experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="r"))

    def log_param(self, run: str, key: str, value: str) -> None:
        assert run == "r"
        self.parameters[key] = value

    def log_batch(self, run: str, metrics: list[Metric]) -> None:
        assert run == "r"
        self.batches.append(metrics)

    def set_terminated(self, run: str) -> None:
        self.ended.append(run)


def stand_in(patch: pytest.MonkeyPatch, clients: list[Client]) -> None:
    def make(tracking_uri: str | None) -> Client:
        clients.append(Client(tracking_uri))
        return clients[-1]

    patch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=make))
    patch.setitem(sys.modules, "mlflow.entities", SimpleNamespace(Metric=Metric))


def recorded(section: dict[str, Any]) -> Client:
    clients: list[Client] = []
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, clients)
        train(section)
    (client,) = clients
    return client


def test_a_run_is_told_values_in_batches_and_every_key_of_the_config() -> None:
    section = {"tracking_uri": "http://127.0.0.1:5000", "experiment": "gpt", "run_name": "first"}
    (client,) = run_distributed(recorded, 1, section)
    assert client.tracking_uri == "http://127.0.0.1:5000"
    assert (client.experiments, client.runs) == (["gpt"], [("7", "first")])
    assert client.parameters["optimizer.params.lr"] == "0.5"
    (metrics,) = client.batches
    rates = [(m.value, m.step) for m in metrics if m.key == "Train/Samples/lr"]
    assert rates == [(0.5, 4), (0.5, 8), (0.5, 12)]
    assert client.ended == ["r"]


def test_no_request_has_more_metrics_than_mlflow_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, [])
    client = Client()
    MLflowWriter(client, "r").write([Event("a", 1.0, n) for n in range(2500)])
    assert [len(batch) for batch in client.batches] == [1000, 1000, 500]


def refused() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mlflow", None)
        with pytest.raises(ConfigError) as caught:
            train({})
    for job in list(_open_jobs):
        job.close()
    return str(caught.value)


def test_a_missing_client_is_named_with_what_to_install() -> None:
    (message,) = run_distributed(refused, 1)
    assert "pip install 'drivetrain-mlflow[client]'" in message


def dead(method: str) -> tuple[int, list[str]]:
    """Calls of a method that fails as when nobody listens at the endpoint; what is said."""
    clients: list[Client] = []
    calls: list[str] = []
    said: list[str] = []

    def refuse(_client: Client, *_arguments: object) -> None:
        calls.append(method)
        raise ConnectionError("nobody answers at http://127.0.0.1:9")

    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("drivetrain.monitor").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, clients)
        patch.setattr(Client, method, refuse)
        patch.setattr(MLflow, "most_steps", 1)  # every step is sent
        train({"tracking_uri": "http://127.0.0.1:9"})
    return len(calls), said


@pytest.mark.parametrize("method", ["get_experiment_by_name", "log_batch"])
def test_a_dead_endpoint_is_said_once_and_training_goes_on(method: str) -> None:
    ((calls, said),) = run_distributed(dead, 1, method)
    words = "mlflow shows nothing more, training goes on: ConnectionError: nobody answers"
    assert calls == 1
    assert [message.startswith(words) for message in said] == [True]
