"""The config section ``cpu``; the accelerator reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from drivetrain.contracts import Bool, Plugin, PositiveInt, Section, Sections


class CpuSection(Section):
    """How ranks use the host."""

    bind_cores: Literal["auto"] | Bool = Field(
        default="auto",
        description="Keep each rank on cores of its own. auto does so when several ranks share the "
        "host, there is a core for each, and the launcher has not bound them already.",
    )
    threads: Literal["auto"] | PositiveInt = Field(
        default="auto",
        description="Threads of one rank. auto takes OMP_NUM_THREADS if somebody has set it, else "
        "the host's cores divided by its ranks.",
    )
    shared_memory: Bool = Field(
        default=True, description="Let ranks of one host communicate through shared memory."
    )


class Cpu(Plugin):
    """Owns the section; :class:`~drivetrain_cpu.accelerator.CpuAccelerator` acts on it."""

    name = "cpu"
    sections: ClassVar[Sections] = {"cpu": CpuSection}

    def features(self) -> Mapping[str, object]:
        return {"cpu.shared_memory": self.section(CpuSection).shared_memory}

    def feature_values(self) -> Mapping[str, Sequence[object]]:
        return {"cpu.shared_memory": (True, False)}
