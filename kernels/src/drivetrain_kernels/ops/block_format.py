"""Block quantisation: codes of 8 or 4 bits with one float32 scale (and offset) per block.

The arithmetic is fixed in float32, so that implementations can agree to the bit:

- symmetric: ``scale = max|x| / largest code``, ``code = round(x * (1 / scale))``;
- asymmetric: ``scale = (max - min) / largest code``, ``offset = min``,
  ``code = round((x - min) * (1 / scale))``, codes from 0.

Rounding is to nearest, ties to even. A block whose range is below 2**-100 gets scale 1 and codes 0;
a block with an infinity or NaN, or whose range is no finite float32, gets NaN parameters and
codes 0, so that it comes back as NaN instead of as something plausible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from drivetrain_kernels.checks import FLOATS, Checker, name_of

SMALLEST_RANGE = 2.0**-100


@dataclass(frozen=True)
class Format:
    """How codes are stored.

    Args:
        name: ``int8``, ``int4``, ``fp8_e4m3`` or ``fp8_e5m2``.
        symmetric: whether codes have a sign and there is no offset.
        largest: the code that the largest value maps to.
        dtype: storage dtype; int4 packs two codes per uint8, the first in the low four bits; fp8
            codes are stored as bytes, which every device and transport can move.
        packed: codes per element of storage.
        fp8: the dtype that fp8 bytes are codes of.
    """

    name: str
    symmetric: bool
    largest: float
    dtype: torch.dtype
    packed: int = 1
    fp8: torch.dtype | None = None

    @property
    def parameters(self) -> int:
        """Number of float32 parameters per block."""
        return 1 if self.symmetric else 2


_FORMATS = {
    (each.name, each.symmetric): each
    for each in (
        Format("int8", True, 127.0, torch.int8),
        Format("int8", False, 255.0, torch.uint8),
        Format("int4", True, 7.0, torch.uint8, packed=2),
        Format("int4", False, 15.0, torch.uint8, packed=2),
        Format("fp8_e4m3", True, 448.0, torch.uint8, fp8=torch.float8_e4m3fn),
        Format("fp8_e5m2", True, 57344.0, torch.uint8, fp8=torch.float8_e5m2),
    )
}
FORMATS = tuple(_FORMATS)
"""All (format, symmetric) pairs."""


def format_of(name: str, symmetric: bool) -> Format:
    """The format of that name; ``KeyError`` where there is none (checked before)."""
    return _FORMATS[name, symmetric]


def blocks_of(numel: int, block: int) -> int:
    """Number of blocks; the last may be short."""
    return -(-numel // block)


def code_count(numel: int, format: Format) -> int:
    """Number of storage elements for ``numel`` codes."""
    return -(-numel // format.packed)


def encode(values: torch.Tensor, format: Format, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a flat tensor [n]: codes [code_count] and parameters [blocks, parameters]."""
    numel = values.numel()
    grid = _blocked(values, block)
    inside = _blocked(torch.ones_like(values, dtype=torch.bool), block)
    if format.symmetric:
        low = torch.zeros_like(grid[:, :1])
        extent = grid.abs().amax(1, keepdim=True) if grid.numel() else grid[:, :1]
    elif grid.numel():
        low = grid.masked_fill(~inside, float("inf")).amin(1, keepdim=True)
        extent = grid.masked_fill(~inside, -float("inf")).amax(1, keepdim=True) - low
    else:
        low = extent = grid[:, :1]
    broken = ~(extent <= torch.finfo(torch.float32).max)
    flat_block = extent < SMALLEST_RANGE
    scale = torch.where(flat_block, 1.0, extent / format.largest)
    steps = (grid - low) * (1.0 / scale)
    steps = steps.masked_fill(broken | flat_block, 0.0)
    parameters = scale if format.symmetric else torch.cat([scale, low], 1)
    parameters = parameters.masked_fill(broken, float("nan"))
    codes = _pack(steps.reshape(-1)[:numel], format)
    return codes, parameters


def decode(
    codes: torch.Tensor, parameters: torch.Tensor, format: Format, block: int, numel: int
) -> torch.Tensor:
    """Values [numel] in the dtype of ``parameters``: ``code * scale (+ offset)``."""
    steps = _blocked(_unpack(codes, format, numel).to(parameters.dtype), block)
    values = steps * parameters[:, :1]
    if not format.symmetric:
        values = values + parameters[:, 1:]
    return values.reshape(-1)[:numel]


def _blocked(flat: torch.Tensor, block: int) -> torch.Tensor:
    """[n] as [blocks, block], the last row filled up with zeros."""
    missing = blocks_of(flat.numel(), block) * block - flat.numel()
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, block)


def _pack(steps: torch.Tensor, format: Format) -> torch.Tensor:
    if format.fp8 is not None:
        return steps.float().to(format.fp8).view(torch.uint8)
    low = -format.largest if format.symmetric else 0.0
    codes = torch.round(steps).clamp(low, format.largest)
    if format.packed == 1:
        return codes.to(format.dtype)
    nibbles = codes.to(torch.int32) & 0xF
    pairs = torch.nn.functional.pad(nibbles, (0, nibbles.numel() % 2)).view(-1, 2)
    return (pairs[:, 0] | (pairs[:, 1] << 4)).to(torch.uint8)


def _unpack(codes: torch.Tensor, format: Format, numel: int) -> torch.Tensor:
    if format.fp8 is not None:
        return codes.view(format.fp8).float()
    if format.packed == 1:
        return codes
    bytes_ = codes.to(torch.int32)
    nibbles = torch.stack([bytes_ & 0xF, bytes_ >> 4], 1).reshape(-1)[:numel]
    return torch.where(nibbles >= 8, nibbles - 16, nibbles) if format.symmetric else nibbles


# -- checks shared by the ops on codes -----------------------------------------------------------


def check_format(checker: Checker, format: str, block: int, symmetric: bool) -> Format:
    """A known format and a positive even block size."""
    if (format, symmetric) not in _FORMATS:
        kind = "symmetric" if symmetric else "asymmetric"
        known = ", ".join(name for name, kind_ in _FORMATS if kind_ == symmetric)
        raise checker.fail("format", f"is {format!r}", f"one of {known} for {kind} quantisation")
    if block < 2 or block % 2:
        raise checker.fail("block", f"is {block}", "an even number of elements, at least 2")
    return _FORMATS[format, symmetric]


def check_codes(
    checker: Checker,
    codes: torch.Tensor,
    parameters: torch.Tensor,
    format: Format,
    block: int,
    numel: int,
    sources: tuple[int, ...] = (),
) -> None:
    """Codes [*sources, count] and parameters [*sources, blocks, parameters] that fit ``numel``."""
    expected = (*sources, code_count(numel, format))
    checker.dtype(codes, "codes", format.dtype)
    if tuple(codes.shape) != expected or not codes.is_contiguous():
        raise checker.fail("codes", f"has shape {tuple(codes.shape)}", f"contiguous {expected}")
    expected = (*sources, blocks_of(numel, block), format.parameters)
    if parameters.dtype not in (torch.float32, torch.float64):
        raise checker.fail("parameters", f"is {name_of(parameters.dtype)}", "float32")
    if tuple(parameters.shape) != expected or not parameters.is_contiguous():
        shape = tuple(parameters.shape)
        raise checker.fail("parameters", f"has shape {shape}", f"contiguous {expected}")
    checker.same_device(parameters, "parameters", codes.device)


def check_output_dtype(checker: Checker, dtype: torch.dtype) -> None:
    """A floating dtype that kernels store."""
    if dtype not in (*FLOATS, torch.float64):
        raise checker.fail("dtype", f"is {name_of(dtype)}", "float32, bfloat16 or float16")
