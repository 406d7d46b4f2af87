"""Keys of DeepSpeed that mean nothing here: accepted with a note, or refused with advice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from drivetrain.contracts.plugin.plugin import Plugin, Problem, Sections, hookimpl
from drivetrain.contracts.plugin.section import Bool, Scalar

if TYPE_CHECKING:
    from drivetrain.plan.plan import Plan

_NO_EFFECT = {
    "disable_allgather": "whoever shards parameters publishes them",
    "graph_harvesting": "updates already run as few fused operations",
    "zero_allow_untested_optimizer": "elementwise optimizers can be sharded, others are refused",
    "zero_force_ds_cpu_optimizer": "an update runs where its states live",
}

_NO_EFFECT_WHATEVER = {
    "compute_grad_norm": "the norm is computed when something needs it",
    "parameter_alignment": "buckets are aligned as the device needs it",
    "comms_config": "the communicator has no settings of its own",
}
"""Keys whose values have several types."""

_ADVICE = {
    "amp": "apex is not supported; use torch_autocast, bf16 or fp16",
    "nebula": "this checkpoint service is not supported; remove the section",
    "datastates_ckpt": "this checkpoint engine is not supported; remove the section",
}


class NoEffect(Scalar[Bool]):
    """Accepted, has no effect; ``drivetrain explain`` says why."""

    root: Bool = False


class Unsupported(BaseModel):
    """A section that must stay off; its other keys are not looked at."""

    model_config = ConfigDict(frozen=True, extra="allow")

    enabled: Bool = Field(default=False, description="Must be false.")


class AlwaysOn(Scalar[Any]):
    """A section whose presence asks for something that is not supported."""

    root: Any = None


class Ignored(Scalar[Any]):
    """Accepted with any value, has no effect; ``drivetrain explain`` says why."""

    root: Any = None


class Legacy(Plugin):
    """Owns the keys that have no meaning here."""

    name = "legacy"
    sections: ClassVar[Sections] = {
        **dict.fromkeys(_NO_EFFECT, NoEffect),
        **dict.fromkeys(_NO_EFFECT_WHATEVER, Ignored),
        "amp": Unsupported,
        "nebula": Unsupported,
        "datastates_ckpt": AlwaysOn,
    }

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        refused = [p for p, section in self._sections.items() if getattr(section, "enabled", True)]
        return [Problem(path, _ADVICE[path]) for path in refused if path in _ADVICE]

    def notes(self) -> Sequence[str]:
        reasons = {**_NO_EFFECT, **_NO_EFFECT_WHATEVER}
        return [f"{p}: no effect, {reasons[p]}" for p in self._sections if p in reasons]
