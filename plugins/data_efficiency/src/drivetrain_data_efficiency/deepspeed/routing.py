"""``deepspeed.runtime.data_pipeline.data_routing.helper``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError
from drivetrain_data_efficiency.routing.random_ltd import PATH, layer_classes, of_job


def convert_to_random_ltd(model: Any, convert_type: type) -> Any:
    """Say which class layers that drop tokens have; returns the model or engine.

    Before ``initialize`` it chooses the layers. Called with an engine, it checks that those which
    the config has chosen are of that class: layers are never replaced here, so names of parameters
    stay as they are.

    Raises:
        ConfigError: the engine drops no tokens, or in layers of another class.
    """
    if not isinstance(model, Engine):
        layer_classes[model] = convert_type
        return model
    dropping = of_job.get(model.job)
    if dropping is None:
        raise ConfigError(
            f"the engine drops no tokens: write {PATH} into the config, enabled, with "
            "data_efficiency and data_routing enabled"
        )
    others = [unit for unit in dropping.layers if not isinstance(unit.module, convert_type)]
    if others:
        raise ConfigError(
            f"the engine drops tokens in {others[0].name}, a {type(others[0].module).__name__}; "
            f"for layers of {convert_type.__name__} call convert_to_random_ltd(model, ...) before "
            "initialize"
        )
    return model


def save_without_random_ltd(model: Any) -> Any:
    """The model's state dict; names have no prefix here."""
    return model.module_state_dict() if isinstance(model, Engine) else model.state_dict()


def remove_random_ltd_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Names of a state dict of DeepSpeed without its wrapper's ``random_ltd_layer``."""
    return {name.replace(".random_ltd_layer", ""): value for name, value in state_dict.items()}
