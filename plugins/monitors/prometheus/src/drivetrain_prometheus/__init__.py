"""Shows the progress of training at an endpoint that Prometheus scrapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from drivetrain.contracts import Bool, Section, Sections
from drivetrain.errors import ConfigError
from drivetrain.monitor import Event, Monitor

if TYPE_CHECKING:
    from threading import Thread
    from wsgiref.simple_server import WSGIServer

    from prometheus_client import CollectorRegistry, Gauge

    from drivetrain import Engine

__all__ = ["Prometheus", "PrometheusSection", "PrometheusWriter"]


class PrometheusSection(Section):
    """An endpoint ``http://ADDRESS:PORT/metrics`` with the latest numbers of training."""

    enabled: Bool = Field(default=False, description="Serve the endpoint.")
    address: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen at; 0.0.0.0 lets other hosts in.",
    )
    port: int = Field(
        default=9400, ge=0, lt=65536, description="Port of local rank 0; local rank n adds n."
    )
    ranks: Literal["first", "all"] = Field(default="first", description="Who serves one.")
    job_name: str = Field(default="drivetrain", min_length=1, description="The label `job_name`.")


class Prometheus(Monitor):
    """Owns ``prometheus``."""

    name = "prometheus"
    sections: ClassVar[Sections] = {"prometheus": PrometheusSection}
    most_seconds: ClassVar[float] = 1.0
    detailed: ClassVar[bool] = True

    def writes_on(self, rank: int) -> bool:
        return rank == 0 or self.section(PrometheusSection).ranks == "all"

    def open_writer(self, engine: Engine, number: int) -> PrometheusWriter:
        section, ranks = self.section(PrometheusSection), engine.job.ranks
        # A second engine of the job has an endpoint of its own, above those of all local ranks.
        port = section.port + ranks.local_rank + number * ranks.ranks_on_host
        labels = {"job_name": section.job_name, "rank": str(ranks.rank), "engine": str(number)}
        try:
            return PrometheusWriter(section.address, port if section.port else 0, labels)
        except OSError as error:
            raise ConfigError(
                f"prometheus.port: rank {ranks.rank} cannot listen at {section.address}:{port} "
                f"({error.strerror or error}); give another port, or 0 for a free one"
            ) from error

    def features(self) -> Mapping[str, object]:
        return {"prometheus.enabled": self.section(PrometheusSection).enabled}


class PrometheusWriter:
    """Keeps the latest value of each event as a gauge, and serves them.

    Args:
        address: to listen at.
        port: to listen at; 0 for a free one.
        labels: label -> value, the same for all gauges.

    Attributes:
        port: where it listens.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, address: str, port: int, labels: Mapping[str, str]) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._registry: CollectorRegistry = CollectorRegistry()
        self._labels = dict(labels)
        self._gauges: dict[str, Gauge] = {}
        self._server: WSGIServer
        self._thread: Thread
        self._server, self._thread = start_http_server(port, address, self._registry)
        self.port: int = self._server.server_port

    def write(self, events: Sequence[Event]) -> None:
        latest = {metric_name(event.name): event for event in events}
        for name, event in latest.items():
            self._set(name, event.name, event.value)
        if latest:
            place = max(event.samples for event in latest.values())
            self._set("drivetrain_samples", "global samples seen", place)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _set(self, name: str, text: str, value: float) -> None:
        if name not in self._gauges:
            from prometheus_client import Gauge

            self._gauges[name] = Gauge(name, text, list(self._labels), registry=self._registry)
        self._gauges[name].labels(**self._labels).set(value)


def metric_name(event: str) -> str:
    """What Prometheus calls an event: ``Train/Samples/lr`` is ``drivetrain_lr``."""
    name = event.removeprefix("Train/Samples/").lower()
    return "drivetrain_" + re.sub(r"[^a-z0-9_]+", "_", name).strip("_")
