"""``deepspeed.runtime.data_pipeline.data_routing``: its helpers, and its wrapper of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError
from drivetrain_data_efficiency.routing.random_ltd import PATH, layer_classes, of_job


class RandomLayerTokenDrop(nn.Module):
    """A layer under DeepSpeed's prefix, for models that wrap layers themselves.

    It only passes on what it is given: where the config drops tokens, this is the layer that gets
    fewer of them.

    Args:
        layer: computes; takes hidden states first, and everything else by keyword.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.random_ltd_layer = layer

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        """What the layer returns for hidden states [batch, tokens, width]."""
        return self.random_ltd_layer(hidden_states, **kwargs)


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
    """The model's state dict; names have no prefix, except of layers that the script wrapped."""
    whole = model.module_state_dict() if isinstance(model, Engine) else model.state_dict()
    return remove_random_ltd_state_dict(whole)


def remove_random_ltd_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Names of a state dict of DeepSpeed without its wrapper's ``random_ltd_layer``."""
    return {name.replace(".random_ltd_layer", ""): value for name, value in state_dict.items()}
