"""Progressive layer drop: layers are skipped more and more often as training goes on.

Zhang and He 2020, "Accelerating Training of Transformer-Based Language Models with Progressive
Layer Dropping", https://arxiv.org/abs/2010.13369, equation 4 and algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar
from weakref import WeakSet

from pydantic import Field

from drivetrain.contracts import Bool, Float, NonNegativeFloat, Plugin, Section, Sections, hookimpl

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine

__all__ = ["ProgressiveLayerDrop", "ProgressiveLayerDropSection", "current_theta", "theta"]

_PATH = "progressive_layer_drop"
_KEYWORDS = ("progressive_layer_drop", "pld_theta")


class ProgressiveLayerDropSection(Section):
    """Layers are skipped more and more often as training goes on."""

    enabled: Bool = Field(default=False, description="Tell the model how many layers to keep.")
    theta: Annotated[Float, Field(ge=0, le=1)] = Field(
        default=0.5, description="The ratio of layers kept that training tends to."
    )
    gamma: NonNegativeFloat = Field(
        default=0.001, description="How fast, per optimizer step; the half-life is 0.7 / gamma."
    )


class ProgressiveLayerDrop(Plugin):
    """Owns ``progressive_layer_drop``."""

    name = _PATH
    sections: ClassVar[Sections] = {_PATH: ProgressiveLayerDropSection}

    @hookimpl
    def prepare_inputs(
        self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not engine.training:
            return None
        if engine not in _checked:
            from drivetrain.checked_call import require_keywords

            require_keywords(_PATH, engine.module, _KEYWORDS)
            _checked.add(engine)
        values = (True, _theta_of(engine, self.section(ProgressiveLayerDropSection)))
        return args, {**kwargs, **dict(zip(_KEYWORDS, values, strict=True))}

    def features(self) -> Mapping[str, object]:
        return {"progressive_layer_drop.enabled": True}

    def feature_values(self) -> Mapping[str, Sequence[object]]:
        return {"progressive_layer_drop.enabled": (True,)}


_checked: WeakSet[Engine] = WeakSet()
"""Engines whose model is known to take the keywords."""


def theta(step: int, limit: float, gamma: float) -> float:
    """The ratio of layers to keep: ``(1 - limit) exp(-gamma step) + limit``.

    Args:
        step: optimizer steps taken before the latest one; 0 before the first and after it.
        limit: what the ratio tends to, in [0, 1].
        gamma: how fast, at least 0.
    """
    return (1.0 - limit) * math.exp(-gamma * step) + limit


def current_theta(engine: Engine) -> float | None:
    """The ratio that the next forward of ``engine`` gets; ``None`` when layers are not dropped."""
    section = engine.job.plan.section(ProgressiveLayerDropSection)
    return _theta_of(engine, section) if section.enabled else None


def _theta_of(engine: Engine, section: ProgressiveLayerDropSection) -> float:
    # One step behind, as in DeepSpeed: it updates the ratio after a step, with the count before it.
    return theta(max(engine.progress.steps - 1, 0), section.theta, section.gamma)
