"""Layers of a model that only serves, changed in place to hold packed weights."""

from __future__ import annotations

import torch
from torch import nn

from drivetrain.contracts import WeightFormat
from drivetrain.errors import ConfigError
from drivetrain_compression.recipe.recipe import matching
from drivetrain_compression.stored.converting import obstacle, users_of
from drivetrain_compression.stored.formats import format_named
from drivetrain_compression.stored.linear import StoredEmbedding, StoredLinear
from drivetrain_compression.stored.section import PATH, GroupSection, ServedWeightsSection
from drivetrain_compression.stored.weight import StoredWeight
from drivetrain_compression.training.api import Config, section_at

_PLAIN: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding)
_STORED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: StoredLinear,
    nn.Embedding: StoredEmbedding,
}


def store_for_serving(
    model: nn.Module, config: Config, dtype: torch.dtype | None = None
) -> nn.Module:
    """Pack weights of a module in memory, each let go before the next.

    Args:
        model: changed in place; layers that are packed already stay as they are.
        config: a config with the section ``weight_quantization``, or the path of one.
        dtype: that the model computes in; its weights' by default.

    Returns:
        The model.

    Raises:
        ConfigError: the section is wrong, or a layer cannot be packed; names it.
    """
    section = section_at(config, PATH, ServedWeightsSection)
    for layer, (name, form) in formats_of(model, section).items():
        store(name, layer, form, dtype)
    return model


def formats_of(
    model: nn.Module, section: ServedWeightsSection
) -> dict[nn.Module, tuple[str, WeightFormat]]:
    """Which layers are to be packed, their names and formats; nothing is changed.

    Raises:
        ConfigError: a pattern finds no layer, two find one, or a layer cannot be packed.
    """
    users, key_of = users_of(model), dict[str, str]()
    found: dict[nn.Module, tuple[str, WeightFormat]] = {}
    every = section.quantized_initialization
    label = f"{PATH}.{'quantized_initialization' if every else 'post_init_quant'}"
    wanted = {"*": every} if every else section.post_init_quant
    for key, group in wanted.items():
        form = _format(group, label)
        for target in matching(model, [key], (*_PLAIN, *_STORED.values()), label):
            name, layer = target.name, target.module
            if name in key_of:
                raise ConfigError(f"{label}: {name} is found by {key_of[name]!r} and by {key!r}")
            key_of[name] = key
            reason = _reason(layer, users)
            if isinstance(layer, tuple(_STORED.values())) or (reason and every):
                continue  # packed before, or no layer that is asked for by name
            if reason:
                raise ConfigError(f"{label}: {name} cannot be stored in few bits: {reason}")
            try:
                form.tensors(layer.weight.shape)  # type: ignore[arg-type]
            except ConfigError as error:
                raise ConfigError(f"{label}: {name}: {error}") from error
            found[layer] = name, form
    return found


def _format(group: GroupSection, label: str) -> WeightFormat:
    try:
        if group.format:
            return format_named(group.format)
        return format_named(
            f"grouped_int{group.num_bits}",
            group=group.group_size,
            dim=group.group_dim % 2,
            symmetric=group.symmetric,
        )
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from error


def _reason(layer: nn.Module, users: dict[int, list[str]]) -> str:
    if type(layer) not in _PLAIN:
        return f"it is a {type(layer).__name__}, whose own forward would be lost"
    if getattr(layer, "max_norm", None) is not None:
        return "max_norm changes its weight in forward"
    return obstacle(layer, users)


@torch.no_grad()
def store(
    name: str, layer: nn.Module, form: WeightFormat, dtype: torch.dtype | None = None
) -> None:
    """Make a linear layer or an embedding hold its weight packed. Its hooks stay.

    Raises:
        ConfigError: the weight is not finite; says ``name``.
    """
    weight = layer._parameters["weight"]
    assert weight is not None
    try:
        packed = StoredWeight(weight, form)
    except ConfigError as error:
        raise ConfigError(f"{PATH}: {name}: {error}") from error
    packed.dtype = dtype or weight.dtype
    packed.train(layer.training)
    del layer._parameters["weight"]
    weight.data = weight.new_empty(0)  # whoever holds the parameter holds no memory
    layer.__class__ = _STORED[type(layer)]
    layer.weight = packed
