"""Shows the progress of training in Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from drivetrain.contracts import Bool, Section, Sections
from drivetrain.monitor import Event, Monitor, shown_config

if TYPE_CHECKING:
    from drivetrain import Engine

__all__ = ["WandbSection", "WandbWriter", "WeightsAndBiases"]


class WandbSection(Section):
    """A run in Weights & Biases."""

    enabled: Bool = Field(default=False, description="Log to Weights & Biases.")
    group: str | None = Field(default=None, description="Group of runs.")
    team: str | None = Field(default=None, description="Team or user that owns the project.")
    project: str = Field(default="deepspeed", min_length=1, description="Project.")
    name: str | None = Field(default=None, description="Name of the run; chosen if unset.")
    mode: Literal["online", "offline"] | None = Field(
        default=None, description="Where to log; `WANDB_MODE` decides if unset."
    )


class WeightsAndBiases(Monitor):
    """Owns ``wandb``."""

    name = "wandb"
    sections: ClassVar[Sections] = {"wandb": WandbSection}
    detailed: ClassVar[bool] = True

    def open_writer(self, engine: Engine, number: int) -> WandbWriter:
        import wandb

        section = self.section(WandbSection)
        name = section.name if number == 0 or section.name is None else f"{section.name}.{number}"
        run = wandb.init(
            project=section.project,
            entity=section.team,
            group=section.group,
            name=name,
            mode=section.mode,
            config=shown_config(engine),
            reinit="create_new",
        )
        return WandbWriter(run)

    def features(self) -> Mapping[str, object]:
        return {"wandb.enabled": self.section(WandbSection).enabled}


class WandbWriter:
    """Logs all values of one place on the x axis at once, with global samples as the step.

    Args:
        run: as ``wandb.init`` has made it.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, events: Sequence[Event]) -> None:
        rows: dict[int, dict[str, float]] = {}
        for event in events:
            rows.setdefault(event.samples, {})[event.name] = event.value
        for samples, values in rows.items():
            self._run.log(values, step=samples)

    def close(self) -> None:
        self._run.finish()
