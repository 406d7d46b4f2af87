"""The endpoint answers with the latest numbers of training, and with those that come fast."""

from __future__ import annotations

import socket
from typing import Any
from urllib.request import urlopen

import pytest
from drivetrain_prometheus import Prometheus, PrometheusWriter, metric_name
from prometheus_client.parser import text_string_to_metric_families

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.job.job import _open_jobs
from drivetrain.monitor import Event, write_events
from drivetrain.plan.registry import Registry
from drivetrain.testing import PluginConformance, data, run_distributed
from drivetrain.testing.models import mlp


class TestPrometheus(PluginConformance):
    plugin = Prometheus
    config = {"prometheus": {"enabled": True}}


def train(section: dict[str, Any], steps: int = 3) -> dict[str, tuple[dict[str, str], float]]:
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "gradient_clipping": 100.0,
        "prometheus": {"enabled": True, **section},
    }
    engine, *_ = drivetrain.initialize(
        model=mlp(), config=config, registry=Registry.installed().with_plugins(Prometheus)
    )
    inputs, targets = data.vectors(4)
    share = engine.train_micro_batch_size_per_gpu()
    rows = slice(engine.job.rank * share, (engine.job.rank + 1) * share)
    for _ in range(steps):
        engine.backward(engine(inputs[rows], targets[rows]))
        engine.step()
    write_events(engine, [("accuracy", 0.25, engine.global_samples)])
    plugin = engine.job.hub.plugins["prometheus"]
    assert isinstance(plugin, Prometheus)
    found = {}
    if plugin.writes_on(engine.job.rank):
        buffer = plugin.buffer(engine)
        buffer._write()  # as it does once a second
        assert isinstance(buffer._writer, PrometheusWriter)
        found = scrape(buffer._writer.port)
    engine.destroy()
    engine.job.close()
    return found


def scrape(port: int) -> dict[str, tuple[dict[str, str], float]]:
    """Metric -> labels and value."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {s.name: (s.labels, s.value) for family in families for s in family.samples}


def test_the_endpoint_of_each_rank_has_the_latest_values() -> None:
    found = run_distributed(train, 2, {"port": 0, "ranks": "all", "job_name": "gpt"})
    for rank, metrics in enumerate(found):
        labels = {"job_name": "gpt", "rank": str(rank), "engine": "0"}
        assert metrics["drivetrain_lr"] == (labels, 0.5)
        assert metrics["drivetrain_step"] == (labels, 3.0)
        assert metrics["drivetrain_samples"] == (labels, 12.0)
        assert metrics["drivetrain_accuracy"] == (labels, 0.25)
        assert metrics["drivetrain_train_loss"][1] > 0
    assert found[0]["drivetrain_train_loss"][1] == found[1]["drivetrain_train_loss"][1]


def test_by_default_the_first_rank_serves_alone() -> None:
    first, second = run_distributed(train, 2, {"port": 0})
    assert first
    assert not second


def refused(port: int) -> str:
    with pytest.raises(ConfigError) as caught:
        train({"port": port})
    for job in list(_open_jobs):
        job.close()
    return str(caught.value)


def test_a_port_in_use_is_named_with_its_key() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (message,) = run_distributed(refused, 1, port)
    assert message.startswith(f"prometheus.port: rank 0 cannot listen at 127.0.0.1:{port} (")


def test_a_thousand_values_of_one_write_are_all_there() -> None:
    writer = PrometheusWriter("127.0.0.1", 0, {"rank": "0"})
    writer.write([Event(f"value_{n}", float(n), 8) for n in range(1000)])
    metrics = scrape(writer.port)
    writer.close()
    assert [metrics[f"drivetrain_value_{n}"][1] for n in range(1000)] == list(range(1000))


@pytest.mark.parametrize(
    ("event", "name"),
    [("Train/Samples/lr", "drivetrain_lr"), ("Eval/Top-5 error", "drivetrain_eval_top_5_error")],
)
def test_events_get_names_that_prometheus_takes(event: str, name: str) -> None:
    assert metric_name(event) == name
