"""The layout ``compressed-tensors``, which Transformers and vLLM read.

Source: the package compressed-tensors 0.19, its README and the tensors that it reads and writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from drivetrain.errors import CheckpointError, ConfigError
from drivetrain_compression.calibrated.grids import Floats, Grid, Integers, Scales
from drivetrain_compression.calibrated.results import Rounded, stored_scale
from drivetrain_compression.files.packing import pack_words, unpack_words

NAME = "compressed-tensors"
KINDS = ("pack-quantized", "int-quantized", "float-quantized")
"""Formats of layers that are written and read here."""


def tensors_of(name: str, found: Rounded, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of the layer ``name`` as files have them; a row of scales for each output.

    Raises:
        ConfigError: the layout has no place for such a weight; says what to do.
    """
    kind, grid = _kind(name, found), found.grid
    scale = {f"{name}.weight_scale": found.scales.scale.to(dtype)}
    if found.input_scale is not None:
        scale[f"{name}.input_scale"] = torch.tensor([found.input_scale], dtype=dtype)
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
        "strategy": "token" if found.input_scale is None else "tensor",
        "dynamic": found.input_scale is None,
        "observer": None if found.input_scale is None else "minmax",
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


def read(name: str, group: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Rounded:
    """The layer ``name``, from a group of ``config_groups`` and tensors of a file.

    Raises:
        CheckpointError: a tensor is missing or has another shape or dtype, or the scale of inputs
            is not a finite number above 0.
        ConfigError: the layout of the group is not known here.
    """

    def part(kind: str) -> torch.Tensor:
        found = tensors.get(f"{name}.{kind}")
        if found is None:
            raise CheckpointError(f"{name}.{kind} is missing")
        return found

    weights, kind = group["weights"], group.get("format")
    if kind not in KINDS or not weights["symmetric"] or weights.get("actorder"):
        raise ConfigError(
            f"{name}: {kind} (symmetric: {weights['symmetric']}, actorder: "
            f"{weights.get('actorder')}) cannot be read here; {', '.join(KINDS)} without zero "
            "points and order can"
        )
    scale = part("weight_scale").float()
    grid: Grid
    if kind == "pack-quantized":
        rows, columns = (int(each) for each in part("weight_shape"))
        grid, words = Integers(int(weights["num_bits"])), part("weight_packed")
        if list(words.shape) != [rows, -(-columns * grid.bits // 32)]:
            raise CheckpointError(f"{name}: codes {list(words.shape)} of [{rows}, {columns}]")
        if words.dtype != torch.int32:
            raise CheckpointError(f"{name}: codes in {words.dtype}, expected torch.int32")
        numbers = unpack_words(words, grid.bits, columns).float() + grid.low
    else:
        numbers = part("weight").float()
        grid = Integers(8) if kind == "int-quantized" else Floats("e4m3")
    rows, columns = numbers.shape
    size = weights.get("group_size") or columns
    if list(scale.shape) != [rows, columns // size]:
        raise CheckpointError(
            f"{name}: scales {list(scale.shape)}, expected [{rows}, {columns // size}]"
        )
    scales = Scales(scale, torch.zeros_like(scale), size)
    inputs = group.get("input_activations")
    kind = _rounding(name, inputs)
    known = None
    if inputs is not None and not inputs["dynamic"]:
        known = stored_scale(name, part("input_scale"))
    return Rounded(numbers, scales, grid, kind, input_scale=known)


def _rounding(name: str, inputs: Mapping[str, Any] | None) -> str:
    if inputs is None:
        return ""
    known = {("int", 8): "int8", ("float", 8): "e4m3"}
    found = known.get((inputs["type"], inputs["num_bits"]))
    scheme = (inputs["strategy"], bool(inputs["dynamic"]))
    known_scheme = scheme in (("token", True), ("tensor", False)) and inputs["symmetric"]
    if found is None or not known_scheme:
        raise ConfigError(
            f"{name}: inputs of {inputs['num_bits']} bits ({inputs['type']}), by "
            f"{inputs['strategy']}, cannot be rounded here; 8 bits with a scale for each token, or "
            "one that is known, can"
        )
    return found
