"""Where a model is cut: how many layers each chunk has."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drivetrain.errors import ConfigError
from drivetrain_pipeline.balance import BalanceError, Layer, balance
from drivetrain_pipeline.schedules import LayerCosts
from drivetrain_pipeline.section import PATH

if TYPE_CHECKING:
    from drivetrain_pipeline.section import PipelineSection


@dataclass(frozen=True)
class LayerFacts:
    """What is known of a layer before it is cut off.

    Args:
        name: its path in the model.
        kind: name of its class.
        parameters: trainable ones, with those of parts beside units that run just after it (of the
            first layer also before).
    """

    name: str
    kind: str
    parameters: int


@dataclass(frozen=True)
class Measured:
    """Times in seconds and bytes of one layer and micro-batch, from ``measure``."""

    forward: float
    backward: float
    activations: int


def cut(
    layers: Sequence[LayerFacts], chunks: int, method: str, section: PipelineSection
) -> tuple[int, ...]:
    """Return the first layer of each chunk, and the number of layers.

    Args:
        layers: of the whole model.
        chunks: how many parts there are to be.
        method: ``parameters``, ``uniform``, ``type:REGEX`` or ``measured``.
        section: has the file of measured times.

    Raises:
        ConfigError: fewer layers than chunks, a pattern that matches no layer, or a file that lacks
            some.
    """
    if len(layers) < chunks:
        raise ConfigError(
            f"{PATH}.stages: {len(layers)} layers cannot be cut into {chunks} parts "
            f"({section.stages} stages x {chunks // section.stages}), each of which needs one"
        )
    try:
        return balance([Layer(time) for time in _times(layers, method, section)], chunks)
    except BalanceError as error:
        raise ConfigError(f"{PATH}.partition: {error}") from error


def _times(layers: Sequence[LayerFacts], method: str, section: PipelineSection) -> list[float]:
    name = method.lower()
    if name in ("parameters", "auto", "best"):
        return [float(layer.parameters) for layer in layers]
    if name == "uniform":
        return [1.0] * len(layers)
    if name.startswith("type:"):
        return _matching(layers, method[len("type:") :])
    known = read_measured(section)
    for layer in layers:
        if layer.name not in known:
            raise ConfigError(
                f"{PATH}.measured: {section.measured} has no times of {layer.name}, so it is of "
                "another model; measure again"
            )
    found = [known[layer.name] for layer in layers]
    return [costs.forward + costs.full_backward for costs in found]


def _matching(layers: Sequence[LayerFacts], pattern: str) -> list[float]:
    try:
        expression = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ConfigError(
            f"{PATH}.partition: {pattern!r} is no regular expression: {error}"
        ) from error
    found = [float(bool(expression.search(layer.kind))) for layer in layers]
    if not any(found):
        kinds = ", ".join(dict.fromkeys(layer.kind for layer in layers))
        raise ConfigError(
            f"{PATH}.partition: type:{pattern} matches no layer; their classes are {kinds}"
        )
    return found


def read_measured(section: PipelineSection) -> dict[str, LayerCosts]:
    """Read the file that :func:`drivetrain_pipeline.measure` has written.

    Returns:
        Costs of each layer by its name, in the order of the model.

    Raises:
        ConfigError: it cannot be read, or has no layers.
    """
    assert section.measured is not None, "the section was checked"
    path = Path(section.measured)
    try:
        known = {name: Measured(**facts) for name, facts in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{PATH}.measured: {path} cannot be read: {error}") from error
    if not known:
        raise ConfigError(f"{PATH}.measured: {path} has no layers; measure again")
    # The two halves of a backward are about equal: one matrix product each.
    return {
        name: LayerCosts(
            forward=layer.forward,
            inputs=layer.backward / 2,
            weights=layer.backward / 2,
            activations=layer.activations,
        )
        for name, layer in known.items()
    }


def write_measured(path: Path, measured: Mapping[str, Measured]) -> None:
    """Write what :func:`read_measured` reads."""
    text = json.dumps({name: asdict(facts) for name, facts in measured.items()}, indent=1)
    path.write_text(f"{text}\n", "utf-8")
