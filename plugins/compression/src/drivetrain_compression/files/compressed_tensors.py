"""The layout ``compressed-tensors``, which Transformers and vLLM read.

Source: the package compressed-tensors 0.19, its README and the tensors that it reads and writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from drivetrain.errors import ConfigError
from drivetrain_compression.calibrated.grids import Floats, Integers
from drivetrain_compression.calibrated.results import Rounded
from drivetrain_compression.files.packing import pack_words

NAME = "compressed-tensors"


def tensors_of(name: str, found: Rounded, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of the layer ``name`` as files have them; a row of scales for each output.

    Raises:
        ConfigError: the layout has no place for such a weight; says what to do.
    """
    kind, grid = _kind(name, found), found.grid
    scale = {f"{name}.weight_scale": found.scales.scale.to(dtype)}
    if kind == "float-quantized":
        return {f"{name}.weight": found.numbers.to(torch.float8_e4m3fn), **scale}
    assert isinstance(grid, Integers)
    codes = found.numbers.round()
    if kind == "int-quantized":
        return {f"{name}.weight": codes.to(torch.int8), **scale}
    packed = pack_words((codes - grid.low).to(torch.int64), grid.bits)
    made = {f"{name}.weight_packed": packed, **scale}
    made[f"{name}.weight_shape"] = torch.tensor(found.numbers.shape, dtype=torch.int64)
    return made


def described(layers: Mapping[str, Mapping[str, Any]], others: list[str]) -> dict[str, Any]:
    """The entry ``quantization_config`` of a model's config.

    Args:
        layers: facts of rounded layers (of :func:`facts`) by name.
        others: linear layers that are not rounded.
    """
    schemes: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for name, fact in layers.items():
        schemes.setdefault(repr(fact), (fact, []))[1].append(name)
    single = len(schemes) == 1
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if single else names,
            "weights": fact["weights"],
            "input_activations": fact["input_activations"],
            "output_activations": None,
            "format": fact["format"],
        }
        for number, (fact, names) in enumerate(schemes.values())
    }
    formats = {str(fact["format"]) for fact, _ in schemes.values()}
    return {
        "quant_method": NAME,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": others,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def facts(name: str, found: Rounded) -> dict[str, Any]:
    """What the config says of one layer.

    Raises:
        ConfigError: see :func:`tensors_of`.
    """
    kind, grid = _kind(name, found), found.grid
    columns = found.numbers.shape[1]
    grouped = found.scales.group < columns
    weights = {
        "num_bits": grid.bits,
        "type": "float" if isinstance(grid, Floats) else "int",
        "symmetric": grid.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": found.scales.group if grouped else None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }
    return {"format": kind, "weights": weights, "input_activations": _inputs(found)}


def _inputs(found: Rounded) -> dict[str, Any] | None:
    if not found.activations:
        return None
    kind = "int" if found.activations == "int8" else "float"
    return {
        "num_bits": 8,
        "type": kind,
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
        "observer": None,
    }


def _kind(name: str, found: Rounded) -> str:
    grid, columns = found.grid, found.numbers.shape[1]
    if found.low_rank is not None:
        raise ConfigError(f"{name}: {NAME} has no low-rank terms; write the format drivetrain")
    if found.scales.group < columns and columns % found.scales.group:
        raise ConfigError(
            f"{name}: groups of {found.scales.group} do not divide its {columns} inputs, which "
            f"{NAME} needs; choose a group that does, or the format drivetrain"
        )
    if not grid.symmetric:
        # compressed-tensors 0.19 packs zero points, and on the meta device, where Transformers
        # makes the model that files are read into, expects them unpacked: no file fits both.
        raise ConfigError(
            f"{name}: Transformers cannot read zero points in {NAME}; choose symmetric: true, or "
            "write the format drivetrain"
        )
    if isinstance(grid, Floats):
        if grid.name == "e4m3" and found.scales.group == columns:
            return "float-quantized"
        raise ConfigError(f"{name}: {NAME} has no {grid.name}; write the format drivetrain")
    if found.activations == "int8" and grid.bits == 8 and grid.symmetric:
        if found.scales.group < columns:
            raise ConfigError(f"{name}: {NAME} has W8A8 with one scale an output only; group: 0")
        return "int-quantized"
    return "pack-quantized"
