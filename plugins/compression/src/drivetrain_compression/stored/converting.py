"""A model's linear layers, exchanged one by one for layers over packed weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.utils import parametrize

from drivetrain.contracts import WeightFormat
from drivetrain.errors import ConfigError
from drivetrain_compression.calibrated.sources import Source, opened
from drivetrain_compression.recipe.recipe import matching
from drivetrain_compression.stored.config import LoRAConfig, QuantizationConfig
from drivetrain_compression.stored.linear import LoRALinear


def lora_over_quantised(
    model: nn.Module | str | os.PathLike[str],
    lora: LoRAConfig | None = None,
    quantization: QuantizationConfig | None = None,
    *,
    modules: Sequence[str] = (),
) -> nn.Module:
    """A model that trains low-rank changes of frozen, packed weights (QLoRA).

    Matching linear layers become :class:`LoRALinear`, one by one: of a model that is read from a
    folder, there is never more in memory than what is packed and one layer. All other parameters
    are frozen. Layers of a module in memory are exchanged in it.

    Args:
        model: a module, a folder with a model of Transformers, or a GGUF file (read whole).
        lora: by default rank 64 on the usual projections of decoders.
        quantization: by default E4M3.
        modules: patterns, searched in dotted names; by default those that end in one of
            ``lora.target_mods``.

    Returns:
        The model.

    Raises:
        ConfigError: a pattern matches no linear layer, or a layer cannot be exchanged; nothing has
            been changed then, unless a weight turned out to hold numbers that are not finite.
    """
    lora = lora or LoRAConfig()
    # Names that a model does not have are no mistake among the usual ones.
    usual = rf"(^|\.)({'|'.join(map(re.escape, lora.target_mods))})$"
    label = "modules" if modules else "target_mods"
    form = (quantization or QuantizationConfig()).weight_format()
    modes = (
        [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    )
    with opened(model) as source:
        for part, training in modes:  # opened ends training
            part.training = training
        found = _exchangeable(chosen(source.module, modules or [usual], (nn.Linear,), label))
        for name, layer in found.items():
            try:
                form.tensors(layer.weight.shape)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from error
        for parameter in source.module.parameters():
            parameter.requires_grad_(False)
        for name, layer in found.items():
            with _loaded(source, name, layer) as whole:
                new = _changed(name, whole, lora, form)
            _put(source.module, layer, new)
        source.load(source.owned(source.module, ""))
    return source.module


def chosen(
    model: nn.Module, patterns: Sequence[str], kinds: tuple[type[nn.Module], ...], label: str
) -> dict[str, nn.Module]:
    """Layers whose names match one of ``patterns``, whose weights can be packed, by name.

    Raises:
        ConfigError: a pattern matches none of the kinds; or a layer's weight is also used
            elsewhere, made of others, or kept by an engine.
    """
    found = {t.name: t.module for t in matching(model, patterns, kinds, label)}
    users = users_of(model)
    for name, layer in found.items():
        if reason := obstacle(layer, users):
            raise ConfigError(f"{label}: {name} cannot be stored in few bits: {reason}")
    return found


def users_of(model: nn.Module) -> dict[int, list[str]]:
    """Paths of every parameter, by its id."""
    users: dict[int, list[str]] = {}
    for path, part in model.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(f"{path}.{name}")
    return users


def obstacle(layer: nn.Module, users: dict[int, list[str]]) -> str:
    """Why the weight of ``layer`` cannot be packed; empty if it can."""
    weight = layer._parameters.get("weight")
    if parametrize.is_parametrized(layer) or weight is None:
        return "its weight is made of other tensors; remove the parametrisation"
    if len(shared := users[id(weight)]) > 1:
        return f"its weight is also {', '.join(shared)}; leave it out"
    if hasattr(weight, "drivetrain_handle"):
        return "an engine keeps its weight; convert before initialize"
    if not weight.is_floating_point() or weight.dim() != 2:
        return f"its weight is {weight.dtype} {list(weight.shape)}"
    return ""


def _exchangeable(layers: dict[str, nn.Module]) -> dict[str, nn.Linear]:
    found: dict[str, nn.Linear] = {}
    for name, layer in layers.items():
        if type(layer) is not nn.Linear:
            raise ConfigError(
                f"{name} is a {type(layer).__name__}, whose own forward would be lost; "
                "choose plain linear layers"
            )
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
            raise ConfigError(f"{name} has hooks, which would be lost; remove them before")
        found[name] = layer
    return found


def _changed(name: str, layer: nn.Linear, lora: LoRAConfig, form: WeightFormat) -> LoRALinear:
    try:
        return LoRALinear(
            layer.weight,
            layer.bias,
            form,
            rank=lora.lora_r,
            alpha=lora.lora_alpha,
            shards=lora.base_weight_sharding,
            delayed=lora.delay_lora_init,
        )
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


@contextmanager
def _loaded(source: Source, name: str, layer: nn.Linear) -> Iterator[nn.Linear]:
    """The layer with values; they are let go afterwards."""
    names = source.owned(layer, name)
    source.load(names)
    yield layer
    source.drop(names)
    layer._parameters["weight"] = None  # also where it came in memory


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    new.train(old.training)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
