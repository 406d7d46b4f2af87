"""How many tokens are kept at a step, and which."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from drivetrain_data_efficiency.sampling.permutation import seed_of

if TYPE_CHECKING:
    from drivetrain_data_efficiency.section import LtdSchedule

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def kept_tokens(step: int, schedule: LtdSchedule) -> int:
    """Tokens kept of a longer sequence.

    ``floor(step / require_steps * (max - min) + min)``, rounded down to a multiple of
    ``seq_per_step``, and then within [min, max].

    Args:
        step: updates before this one; the first has 0.
        schedule: bounds and speed.
    """
    first, last = schedule.min_value, schedule.max_value
    config = schedule.schedule_config
    raw = math.floor(step / config.require_steps * (last - first) + first)
    # Rounding down may go below the first value, which DeepSpeed allows, down to no token.
    return min(max(raw - raw % config.seq_per_step, first), last)


def draw(place: tuple[int, ...], rows: torch.Tensor, length: int, kept: int) -> torch.Tensor:
    """Draw ``kept`` tokens of each row, all sets of so many equally likely.

    Every token gets a number by a hash of place, row and token (SplitMix64, in whole numbers, alike
    on all devices), and those with the smallest are kept. Nothing is advanced by a draw, so it can
    be repeated: in recomputation, after a resume, on other ranks.

    Args:
        place: what the draw is for, such as seed, step and layer.
        rows: [b], int64, name the rows; equal ones keep the same tokens.
        length: tokens of a row.
        kept: at most ``length``.

    Returns:
        [b, kept], int64, rising.
    """
    base = seed_of("random_ltd", *place)
    keys = _mixed(rows * _signed(_GOLDEN) + _signed(base))
    tokens = torch.arange(1, length + 1, device=rows.device) * _signed(_GOLDEN)
    scores = _mixed(keys[:, None] + tokens)
    return scores.topk(kept, dim=1, largest=False).indices.sort(dim=1).values


def _mixed(values: torch.Tensor) -> torch.Tensor:
    values = (values ^ _shifted(values, 30)) * _signed(_FIRST)
    values = (values ^ _shifted(values, 27)) * _signed(_SECOND)
    return values ^ _shifted(values, 31)


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right without the sign: torch's shift repeats it."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
