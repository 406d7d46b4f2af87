"""Drivetrain's own layout: packed codes, scales and low-rank terms, for every grid there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from drivetrain.errors import CheckpointError
from drivetrain_compression.calibrated.grids import Floats, Grid, Integers, Scales
from drivetrain_compression.calibrated.results import Rounded, stored_scale
from drivetrain_compression.files.packing import pack_words, unpack_words

NAME = "drivetrain"


def tensors_of(name: str, found: Rounded, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of the layer ``name``: words of packed codes, scales in ``dtype``, and the rest."""
    grid, columns = found.grid, found.numbers.shape[1]
    made = {f"{name}.weight_scale": found.scales.scale.to(dtype)}
    if isinstance(grid, Floats):
        codes = grid.format.encode(found.numbers)
    else:
        assert isinstance(grid, Integers)
        codes = (found.numbers + found.scales.spread(columns)[1]).round() - grid.low
        if not grid.symmetric:
            made[f"{name}.weight_zero"] = found.scales.zero.float()
    made[f"{name}.weight_codes"] = pack_words(codes.to(torch.int64), grid.bits)
    if found.low_rank is not None:
        left, right = found.low_rank
        made |= {f"{name}.weight_left": left.to(dtype), f"{name}.weight_right": right.to(dtype)}
    return made


def facts(name: str, found: Rounded) -> dict[str, Any]:
    """What the folder's description says of one layer."""
    grid = found.grid
    return {
        "format": grid.name if isinstance(grid, Floats) else f"int{grid.bits}",
        "symmetric": grid.symmetric,
        "shape": list(found.numbers.shape),
        "group": found.scales.group,
        "activations": found.activations,
        "low_rank": found.low_rank is not None,
        "input_scale": found.input_scale,
    }


def read(name: str, fact: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Rounded:
    """The layer ``name``, from its facts and tensors.

    Raises:
        CheckpointError: a tensor is missing or has another shape or dtype, or the scale of inputs
            is not a finite number above 0.
    """

    def part(kind: str) -> torch.Tensor:
        found = tensors.get(f"{name}.weight_{kind}")
        if found is None:
            raise CheckpointError(f"{name}.weight_{kind} is missing")
        return found

    grid = _grid(fact)
    rows, columns = fact["shape"]
    scale = part("scale").float()
    words = part("codes")
    groups = -(-columns // fact["group"])
    expected = [[rows, groups], [rows, -(-columns * grid.bits // 32)]]
    if [list(scale.shape), list(words.shape)] != expected:
        raise CheckpointError(
            f"{name}: scales {list(scale.shape)} and codes {list(words.shape)}, expected "
            f"{expected[0]} and {expected[1]}"
        )
    if words.dtype != torch.int32:
        raise CheckpointError(f"{name}: codes in {words.dtype}, expected torch.int32")
    codes = unpack_words(words, grid.bits, columns)
    zero = torch.zeros_like(scale)
    if isinstance(grid, Floats):
        scales = Scales(scale, zero, fact["group"])
        numbers = grid.format.decode(codes)
    else:
        assert isinstance(grid, Integers)
        zero = zero if grid.symmetric else part("zero")
        scales = Scales(scale, zero, fact["group"])
        numbers = codes.float() + grid.low - scales.spread(columns)[1]
    rest = (part("left"), part("right")) if fact["low_rank"] else None
    stored = fact.get("input_scale")
    known = None if stored is None else stored_scale(name, stored)
    return Rounded(numbers, scales, grid, fact["activations"], rest, input_scale=known)


def _grid(fact: Mapping[str, Any]) -> Grid:
    kind = str(fact["format"])
    if kind.startswith("int"):
        return Integers(int(kind.removeprefix("int")), bool(fact["symmetric"]))
    return Floats(kind)
