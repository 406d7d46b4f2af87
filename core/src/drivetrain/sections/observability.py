"""What a job tells about itself."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from drivetrain.contracts.plugin.plugin import Plugin, Sections
from drivetrain.contracts.plugin.section import Bool, NonNegativeInt, Scalar, Section

Level = Literal["debug", "info", "warning", "error", "critical"]


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class StepsPerPrint(Scalar[NonNegativeInt | None]):
    """Optimizer steps between two progress lines; unset or 0 for none."""

    root: NonNegativeInt | None = None


class WallClockBreakdown(Scalar[Bool]):
    """Time forward, backward, communication and step, at the cost of synchronising (false)."""

    root: Bool = False


class MemoryBreakdown(Scalar[Bool]):
    """Report memory after forward, backward and step (default false)."""

    root: Bool = False


class DumpState(Scalar[Bool]):
    """Log the merged config and the plan when the engine starts (default false)."""

    root: Bool = False


class LogLevel(Scalar[Level | None]):
    """Level of the loggers under ``drivetrain``; the application's own if unset."""

    root: Annotated[Level | None, BeforeValidator(_lower)] = None


class Throughput(Section):
    """Samples and tokens per second."""

    enabled: Bool = Field(default=True, description="Measure throughput.")
    synchronized: Bool = Field(
        default=True, description="Wait for the device before the clock is read."
    )


class Timers(Section):
    """Which timers run."""

    throughput: Throughput = Field(default=Throughput(), description="Samples/s and tokens/s.")


class Observability(Plugin):
    """Owns the keys that decide what is logged and timed."""

    name = "observability"
    sections: ClassVar[Sections] = {
        "steps_per_print": StepsPerPrint,
        "wall_clock_breakdown": WallClockBreakdown,
        "memory_breakdown": MemoryBreakdown,
        "dump_state": DumpState,
        "log_level": LogLevel,
        "timers": Timers,
    }
