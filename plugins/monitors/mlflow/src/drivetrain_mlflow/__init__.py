"""Shows the progress of training in MLflow."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from drivetrain.contracts import Bool, Section, Sections
from drivetrain.errors import ConfigError
from drivetrain.monitor import Event, Monitor, shown_config

if TYPE_CHECKING:
    from drivetrain import Engine

__all__ = ["MLflow", "MLflowSection", "MLflowWriter"]

_AT_ONCE = 1000
"""Metrics in one request; MLflow takes no more."""

_LONGEST = 6000
"""Characters of a parameter; MLflow takes no more."""


class MLflowSection(Section):
    """A run in MLflow; what is unset is taken from MLflow's own variables."""

    enabled: Bool = Field(default=False, description="Log to MLflow.")
    tracking_uri: str | None = Field(
        default=None, description="Server or folder; `MLFLOW_TRACKING_URI` if unset."
    )
    experiment: str = Field(default="drivetrain", min_length=1, description="Experiment.")
    run_name: str | None = Field(default=None, description="Name of the run; chosen if unset.")


class MLflow(Monitor):
    """Owns ``mlflow``."""

    name = "mlflow"
    sections: ClassVar[Sections] = {"mlflow": MLflowSection}
    detailed: ClassVar[bool] = True

    def open_writer(self, engine: Engine, number: int) -> MLflowWriter:
        try:
            from mlflow import MlflowClient  # type: ignore[import-not-found]
        except ImportError as error:
            raise ConfigError(
                "mlflow: MLflow is not installed: pip install 'drivetrain-mlflow[client]'"
            ) from error

        section = self.section(MLflowSection)
        client = MlflowClient(tracking_uri=section.tracking_uri)
        experiment = client.get_experiment_by_name(section.experiment)
        identity = (
            client.create_experiment(section.experiment)
            if experiment is None
            else experiment.experiment_id
        )
        name = section.run_name
        if name is not None and number:
            name = f"{name}.{number}"
        run = client.create_run(identity, run_name=name)
        for key, value in _flat(shown_config(engine)):
            client.log_param(run.info.run_id, key, str(value)[:_LONGEST])
        return MLflowWriter(client, run.info.run_id)

    def features(self) -> Mapping[str, object]:
        return {"mlflow.enabled": self.section(MLflowSection).enabled}


class MLflowWriter:
    """Sends metrics in batches, with global samples as the step.

    Args:
        client: an ``MlflowClient``.
        run: the run's identity.
    """

    def __init__(self, client: Any, run: str) -> None:
        self._client = client
        self._run = run

    def write(self, events: Sequence[Event]) -> None:
        from mlflow.entities import Metric  # type: ignore[import-not-found]

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, samples) for name, value, samples in events]
        for start in range(0, len(metrics), _AT_ONCE):
            self._client.log_batch(self._run, metrics[start : start + _AT_ONCE])

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a nested config with its path, and its value."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
