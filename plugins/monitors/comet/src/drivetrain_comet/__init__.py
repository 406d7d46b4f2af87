"""Shows the progress of training in Comet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from drivetrain.contracts import Bool, Section, Sections
from drivetrain.errors import ConfigError
from drivetrain.monitor import Event, Monitor, shown_config

if TYPE_CHECKING:
    from drivetrain import Engine

__all__ = ["Comet", "CometSection", "CometWriter"]


class CometSection(Section):
    """An experiment in Comet; what is unset is taken from Comet's own configuration."""

    enabled: Bool = Field(default=False, description="Log to Comet.")
    samples_log_interval: int = Field(
        default=100, ge=1, description="An event is sent once in so many samples."
    )
    project: str | None = Field(default=None, description="Project.")
    workspace: str | None = Field(default=None, description="Workspace.")
    api_key: str | None = Field(
        default=None, description="Key; better in the variable `COMET_API_KEY` than in a file."
    )
    experiment_name: str | None = Field(default=None, description="Name of the experiment.")
    experiment_key: str | None = Field(
        default=None,
        pattern=r"^[0-9A-Za-z]{32,50}$",
        description="Identifies the experiment: 32 to 50 letters and digits.",
    )
    online: bool | None = Field(default=None, description="False writes to files instead.")
    mode: Literal["get", "create", "get_or_create"] | None = Field(
        default=None, description="Whether the experiment is continued or made anew."
    )


class Comet(Monitor):
    """Owns ``comet``."""

    name = "comet"
    sections: ClassVar[Sections] = {"comet": CometSection}
    detailed: ClassVar[bool] = True

    def open_writer(self, engine: Engine, number: int) -> CometWriter:
        try:
            import comet_ml  # type: ignore[import-not-found]
        except ImportError as error:
            raise ConfigError(
                "comet: Comet's client is not installed: pip install 'drivetrain-comet[client]'"
            ) from error

        section = self.section(CometSection)
        experiment = comet_ml.start(
            api_key=section.api_key,
            project=section.project,
            workspace=section.workspace,
            experiment_key=section.experiment_key if number == 0 else None,
            mode=section.mode,
            online=section.online,
        )
        if section.experiment_name is not None:
            suffix = "" if number == 0 else f".{number}"
            experiment.set_name(section.experiment_name + suffix)
        experiment.log_parameters(shown_config(engine), nested_support=True)
        return CometWriter(experiment, section.samples_log_interval)

    def features(self) -> Mapping[str, object]:
        return {"comet.enabled": self.section(CometSection).enabled}


class CometWriter:
    """Sends an event when samples have advanced by an interval since it was last sent.

    Args:
        experiment: as ``comet_ml.start`` has made it.
        interval: in samples.
    """

    def __init__(self, experiment: Any, interval: int) -> None:
        self._experiment = experiment
        self._interval = interval
        self._sent: dict[str, int] = {}

    def write(self, events: Sequence[Event]) -> None:
        for name, value, samples in events:
            if name not in self._sent or samples >= self._sent[name] + self._interval:
                self._experiment.log_metric(name=name, value=value, step=samples)
                self._sent[name] = samples

    def close(self) -> None:
        self._experiment.end()
