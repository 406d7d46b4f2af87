"""Compressed models as ordinary modules."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from drivetrain.errors import CheckpointError, ConfigError
from drivetrain_compression.calibrated.results import put
from drivetrain_compression.calibrated.sources import architecture, of_gguf
from drivetrain_compression.files import compressed_tensors, own
from drivetrain_compression.files.damage import reading
from drivetrain_compression.files.folder import DESCRIPTION

_INDEX = "model.safetensors.index.json"


def load_compressed(path: str | os.PathLike[str], module: nn.Module | None = None) -> nn.Module:
    """The model in a folder that ``drivetrain compress`` has written, or one of Transformers.

    Weights are those that compressed layers compute with; where inputs are rounded, too, they are.

    Args:
        path: the folder, or a GGUF file.
        module: gets the values, if the folder has no config of Transformers.

    Raises:
        ConfigError: there is no model, or nobody here can read its layout.
        CheckpointError: it does not fit the module, or is damaged.
    """
    folder = Path(path)
    if folder.suffix == ".gguf" and folder.is_file():
        return of_gguf(folder).eval()
    described = folder / DESCRIPTION
    if not described.exists():
        return _by_transformers(folder)
    with reading(folder, DESCRIPTION):
        summary = json.loads(described.read_text("utf-8"))
        layout, layers = summary["format"], dict(summary["layers"])
    if layout == compressed_tensors.NAME:
        return _by_transformers(folder)
    if not (folder / _INDEX).exists():
        raise ConfigError(f"{folder} has no {_INDEX}")
    module = _blank(folder) if module is None else module
    _fill(module, folder, layers)
    return module.eval()


def _by_transformers(folder: Path) -> nn.Module:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        options: dict[str, Any] = {
            "dtype": "auto",
            "local_files_only": True,
            "trust_remote_code": False,
            "output_loading_info": True,
        }
        found, told = architecture(config).from_pretrained(str(folder), **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{folder} cannot be opened as a model: {error}") from error
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    if lost := sorted(told["missing_keys"]):  # which Transformers fills with random numbers
        raise CheckpointError(f"{folder} lacks {', '.join(lost[:10])}")
    module: nn.Module = found
    return module.eval()


def _blank(folder: Path) -> nn.Module:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    dtype = getattr(config, "dtype", None) or torch.float32
    made: nn.Module = architecture(config)._from_config(config, dtype=dtype)
    return made


def _fill(module: nn.Module, folder: Path, layers: dict[str, Any]) -> None:
    with reading(folder, _INDEX):
        index = json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"]
        files = sorted(set(index.values()))
    wanted = module.state_dict()
    missing = set(wanted)
    for file in files:
        with reading(folder, file, DESCRIPTION):
            tensors = load_file(folder / file)
            for name, tensor in tensors.items():
                if name in wanted:
                    if wanted[name].shape != tensor.shape:
                        raise CheckpointError(
                            f"{name} has shape {list(tensor.shape)}, and "
                            f"{list(wanted[name].shape)} in the model"
                        )
                    wanted[name].copy_(tensor)
                    missing.discard(name)
            for name, fact in layers.items():
                if f"{name}.weight_codes" in tensors:
                    layer: Any = module.get_submodule(name)
                    put(layer, own.read(name, fact, tensors))
                    missing.discard(f"{name}.weight")
    shared = {wanted[name].data_ptr() for name in wanted if name not in missing}
    if lost := sorted(name for name in missing if wanted[name].data_ptr() not in shared):
        raise CheckpointError(f"{folder} lacks {', '.join(lost[:10])}")
