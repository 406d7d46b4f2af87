"""Adapters from folders that PEFT has written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_inference.adapters.adapter import Adapter

_KEY = re.compile(r"^base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight$")
_SERVED = {
    "lora_alpha", "alpha_pattern", "use_rslora", "peft_type", "bias", "init_lora_weights",
}  # fmt: skip
"""Keys of PEFT's config that are obeyed, or looked at by themselves."""

_ALREADY_SAID = {
    "r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "fan_in_fan_out",
}  # fmt: skip
"""Keys that say which matrices there are, and of what shape, as the file with them does."""

_OF_TRAINING = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_version", "lora_dropout", "megatron_config", "megatron_core", "runtime_config",
    "loftq_config", "corda_config", "eva_config", "lora_ga_config", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
"""Keys that change nothing of what a trained adapter computes, or only with another key."""

_KNOWN = _SERVED | _ALREADY_SAID | _OF_TRAINING

_STARTS = {"gaussian", "eva", "orthogonal"}
"""Values of ``init_lora_weights`` that leave the model's own weights as they are. With others
(pissa, olora, corda, loftq, ...) the adapter belongs to a model that PEFT has changed."""


def load_adapter(name: str, path: Path, module: nn.Module) -> Adapter:
    """The adapter in a folder, for ``module``.

    Args:
        name: how requests choose it.
        path: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        module: what it changes.

    Raises:
        ConfigError: there is none, it is of another kind than LoRA on linear layers, or does not
            fit the module; says what.
    """
    config, tensors = _read(path)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found = _KEY.match(key)
        if found is None:
            raise ConfigError(f"adapter {name}: {key} of {path} is no matrix of LoRA on a layer")
        parts.setdefault(found["layer"], {})[found["part"]] = tensor
    if not parts:
        raise ConfigError(f"adapter {name}: {path} has no matrices")
    layers = dict(module.named_modules())
    pairs: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer, pair in parts.items():
        if layer not in layers:
            raise ConfigError(f"adapter {name} changes {layer}, which the model has not")
        pairs[layers[layer]] = _pair(f"adapter {name}: {layer}", layers[layer], pair, module)
        pairs[layers[layer]][1].mul_(_scale(layer, len(pair["A"]), config))
    return Adapter(name, pairs)


def _read(path: Path) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((path / "adapter_config.json").read_text("utf-8"))
        tensors = load_file(path / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be loaded as an adapter, a folder of PEFT with adapter_config.json and "
            f"adapter_model.safetensors: {error}"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ConfigError(f"{path} is an adapter of kind {kind}, and LORA alone is served")
    # Keys of later versions may change what is computed, so only what is known may be set.
    unserved = sorted(key for key, value in config.items() if value and key not in _KNOWN)
    if config.get("bias", "none") != "none":
        unserved.append("bias")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _STARTS:
        raise ConfigError(
            f"{path}/adapter_config.json has init_lora_weights {start!r}, which changes the "
            "model's own weights; have PEFT convert the adapter to LoRA as it saves it "
            "(path_initial_model_for_weight_conversion), or merge it into the model"
        )
    if unserved:
        raise ConfigError(
            f"{path}/adapter_config.json sets {', '.join(unserved)}, which is not served; merge "
            "the adapter into the model"
        )
    return config, tensors


def _pair(
    place: str, layer: nn.Module, pair: Mapping[str, torch.Tensor], module: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    width = _width(layer)
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if width is None or layer is head:
        raise ConfigError(
            f"{place} is a {type(layer).__name__}"
            + (" that makes logits" if layer is head else "")
            + ", and adapters are served on linear layers of blocks; merge it into the model"
        )
    if pair.keys() != {"A", "B"}:
        raise ConfigError(f"{place} has one matrix of two")
    down, up = pair["A"], pair["B"]
    inputs, outputs = width
    fits = down.dim() == up.dim() == 2 and len(down) == up.shape[1]
    if not fits or (down.shape[1], len(up)) != (inputs, outputs):
        raise ConfigError(
            f"{place} has matrices {list(down.shape)} and {list(up.shape)}, and the layer makes "
            f"{outputs} outputs of {inputs} inputs"
        )
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    place_and_kind = (weight.device, weight.dtype)
    return down.to(*place_and_kind, copy=True), up.to(*place_and_kind, copy=True)


def _width(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer; ``None`` if it is none."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):  # the transposed of a linear layer
        return layer.nx, layer.nf
    return None


def _scale(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """What the product of both matrices is multiplied by."""
    alpha = config.get("lora_alpha", rank)
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = own
            break  # PEFT takes the first, too
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))
