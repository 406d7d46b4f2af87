"""The config sections ``flops_profiler`` and ``comms_logger``."""

from __future__ import annotations

from pydantic import Field

from drivetrain.contracts import (
    NO_EFFECT,
    Bool,
    Float,
    Int,
    NonNegativeInt,
    PathText,
    PositiveInt,
    Section,
)

FLOPS, COMMS = "flops_profiler", "comms_logger"


class FlopsProfilerSection(Section):
    """What a step of the model computes, and how long that takes, by module."""

    enabled: Bool = Field(default=False, description="Profile one step, and go on without cost.")
    profile_step: NonNegativeInt = Field(
        default=1,
        description="Optimizer steps before the one whose time is taken; operations are counted in "
        "the step before it, where that is the first one in the same step.",
    )
    module_depth: Int = Field(
        default=-1, description="Depth down to which modules are listed; -1 for the deepest."
    )
    top_modules: PositiveInt = Field(
        default=1, description="Modules of each depth that are listed as the largest."
    )
    detailed: Bool = Field(default=True, description="Print the module with figures in it.")
    output_file: PathText | None = Field(
        default=None, description="File that the profile goes to; standard output if unset."
    )
    recompute_fwd_factor: Float = Field(
        default=0.0, description=NO_EFFECT + "what backward computes again is counted."
    )


class CommsLoggerSection(Section):
    """Counts and times collectives by operation and size."""

    enabled: Bool = Field(default=True, description="Log collectives.")
    prof_all: Bool = Field(default=True, description="Log all of them.")
    prof_ops: list[str] = Field(
        default=[], description="Operations that are logged where prof_all is false."
    )
    verbose: Bool = Field(default=False, description="A log line for every collective.")
    debug: Bool = Field(
        default=False, description="Tell in which part of the program a collective was issued."
    )
    synchronized: Bool = Field(
        default=True,
        description="Wait for each collective where it is issued, so that its own time is taken. "
        "Otherwise they overlap as without a log, and times are those until they are waited for.",
    )
