"""The config section ``diloco``."""

from __future__ import annotations

import os
from typing import Literal, Self

from pydantic import Field, model_validator

from drivetrain.contracts import (
    Int,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
)
from drivetrain.errors import ConfigError

PATH = "diloco"

REPLICA = "DRIVETRAIN_REPLICA"
MEETING_POINT = "DRIVETRAIN_MEETING_POINT"
"""Environment variables that stand in for ``replica`` and ``meeting_point``."""


class DilocoSection(Section):
    """Replicas that train apart and average how far they have come (arXiv:2311.08105)."""

    replicas: PositiveInt = Field(
        default=1,
        description="Replicas that the run begins with, and shares that its data is dealt out in; "
        "with 1 there is nobody to meet, and the section does nothing.",
    )
    replica: Int | None = Field(
        default=None,
        ge=0,
        description=f"Which of them this job is, from 0. Default: the variable {REPLICA}.",
    )
    meeting_point: str | None = Field(
        default=None,
        description="host:port where `drivetrain replicas meet` runs. Default: the variable "
        f"{MEETING_POINT}.",
    )
    inner_steps: PositiveInt = Field(
        default=100, description="Steps that each replica trains by itself between two averages."
    )
    outer_learning_rate: PositiveFloat = Field(
        default=0.7, description="Learning rate of the outer optimizer."
    )
    outer_momentum: Share = Field(
        default=0.9, description="Nesterov momentum of the outer optimizer; 0 is plain SGD."
    )
    fragments: PositiveInt = Field(
        default=1,
        description="Parts of the model that travel in turn, evenly spread over the inner steps "
        "(streaming DiLoCo, arXiv:2501.18512).",
    )
    delay: NonNegativeInt = Field(
        default=0, description="Inner steps that go on while an average is under way."
    )
    mixing: Share = Field(
        default=0.5,
        description="With a delay: share of a replica's own weights that stays when the average "
        "arrives.",
    )
    outer_gradients: Literal["fp32", "bf16", "int8", "int4", "fp8_e4m3", "fp8_e5m2"] = Field(
        default="fp32", description="Format in which replicas tell how far they have come."
    )
    block: PositiveInt = Field(
        default=256, multiple_of=2, description="Numbers that share a scale; an even number."
    )
    patience_seconds: PositiveFloat = Field(
        default=60.0,
        description="How long the meeting point is tried, and an exchange goes on in which "
        "nothing arrives. A replica that has ended is not waited for.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.fragments > self.inner_steps:
            raise ValueError(
                f"{self.fragments} fragments cannot travel at different ones of "
                f"{self.inner_steps} inner_steps; take at most as many fragments"
            )
        gap = self.inner_steps // self.fragments
        if self.delay >= gap:
            raise ValueError(
                f"an average of delay {self.delay} would be under way when the next one begins, "
                f"{gap} steps later (inner_steps {self.inner_steps} // fragments "
                f"{self.fragments}); take a delay below {gap}"
            )
        return self

    def flaws(self) -> dict[str, str]:
        """What is wrong with what the section itself says of this job, by key."""
        found = {}
        for key, look in {"replica": self.which, "meeting_point": self.where}.items():
            if getattr(self, key) is not None:
                try:
                    look()
                except ConfigError as error:
                    found[key] = str(error).removeprefix(f"{PATH}.{key}: ")
        return found

    def which(self) -> int:
        """This job's replica.

        Raises:
            ConfigError: nobody says, or there are not so many.
        """
        given: str | int | None = self.replica
        if given is None:
            given = os.environ.get(REPLICA)
        if given is None or not str(given).isdecimal():
            raise ConfigError(
                f"{PATH}.replica: which replica is this job? Start it with `drivetrain replicas "
                f"run`, set {REPLICA}=0 and so on, or give {PATH}.replica (found: {given})"
            )
        if int(given) >= self.replicas:
            raise ConfigError(
                f"{PATH}.replica: {given} is none of {self.replicas} replicas, which count from 0"
            )
        return int(given)

    def where(self) -> tuple[str, int]:
        """Host and port of the meeting point.

        Raises:
            ConfigError: nobody says, or it is no host and port.
        """
        given = self.meeting_point or os.environ.get(MEETING_POINT, "")
        host, _, port = given.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(
                f"{PATH}.meeting_point: expected host:port of `drivetrain replicas meet`, or "
                f"{MEETING_POINT} in the environment; found {given!r}"
            )
        return host.strip("[]"), int(port)
