"""Keys of DeepSpeed that mean nothing here: accepted with a note, or refused with advice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from drivetrain.builtin.base import Builtin
from drivetrain.plugin import Problem, Scalar, hookimpl
from drivetrain.section import Bool

if TYPE_CHECKING:
    from drivetrain.plan import Plan


class DisableAllgather(Scalar[Bool]):
    """Accepted, has no effect: parameters are published by whoever shards them."""

    root: Bool = False


class GraphHarvesting(Scalar[Bool]):
    """Accepted, has no effect: updates already run as few fused operations."""

    root: Bool = False


class AllowUntestedOptimizer(Scalar[Bool]):
    """Accepted, has no effect: elementwise optimizers work with sharding, others are refused."""

    root: Bool = False


class ForceCPUOptimizer(Scalar[Bool]):
    """Accepted, has no effect: an offloaded optimizer always runs where its states live."""

    root: Bool = True


class _Foreign(BaseModel):
    """A section of another system; its other keys are not looked at."""

    model_config = ConfigDict(frozen=True, extra="allow")

    enabled: Bool = Field(default=False, description="Must be false.")


class Amp(_Foreign):
    """Apex mixed precision, which cannot be switched on."""


class Nebula(_Foreign):
    """A proprietary checkpoint service, which cannot be switched on."""


class DataStates(Scalar[Any]):
    """An external checkpoint engine, which cannot be switched on."""

    root: Any = None


_ADVICE = {
    "amp": "apex is not supported; use torch_autocast, bf16 or fp16",
    "nebula": "this checkpoint service is not supported; remove the section",
    "datastates_ckpt": "this checkpoint engine is not supported; remove the section",
}


class Legacy(Builtin):
    """Owns the keys that have no meaning here."""

    name = "legacy"
    sections = {
        "disable_allgather": DisableAllgather,
        "graph_harvesting": GraphHarvesting,
        "zero_allow_untested_optimizer": AllowUntestedOptimizer,
        "zero_force_ds_cpu_optimizer": ForceCPUOptimizer,
        "amp": Amp,
        "nebula": Nebula,
        "datastates_ckpt": DataStates,
    }

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        return [
            Problem(path, _ADVICE[path])
            for path, section in self._sections.items()
            if path in _ADVICE and getattr(section, "enabled", True)
        ]

    def notes(self) -> Sequence[str]:
        return [
            f"{path}: {type(section).__doc__.removeprefix('Accepted, has ').rstrip('.')}"
            for path, section in self._sections.items()
            if type(section).__doc__ is not None and path not in _ADVICE
        ]
