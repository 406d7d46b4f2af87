"""Whether a model computes the same in parts as in one piece, found out with a few tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from drivetrain.errors import ConfigError
from drivetrain.states.units import units
from drivetrain_sequence.inputs import Cutter

if TYPE_CHECKING:
    from drivetrain.communication.functional import Functional
    from drivetrain_sequence.turn import Turn

TOKENS_PER_RANK = 8

_BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION = 0.1
"""Part of the largest result that rounding may change: several roundings, in any order of sums."""


def probe(
    model: nn.Module, cutter: Cutter, arguments: Mapping[str, Any], line: Functional, turn: Turn
) -> None:
    """Compare the model's results for a few tokens of a batch. Collective over ``line``.

    Whatever in a model looks at other tokens without the attention that plugins can reach, or
    numbers them in a way of its own, shows here: ranks have less of the sequence than it expects.

    Args:
        model: the engine's module.
        cutter: of its batches.
        arguments: the first batch, whole.
        line: the ranks of a sequence.
        turn: tells attention whether it sees parts.

    Raises:
        ConfigError: results differ.
    """
    few = cutter.few(arguments, TOKENS_PER_RANK)
    if few is None:
        return
    length = next(few[name] for name in cutter.tokens if name in few).shape[1]
    training, in_forward, cut = model.training, turn.in_forward, turn.cut
    asked: set[nn.Module] = set()
    if cut.chunk is not None:  # two of them
        turn.cut = cutter.cut = replace(cut, chunk=max(1, length // cut.ranks // 2) * cut.ranks)
    model.eval()
    try:
        used, in_parts = cutter.cut, cutter(few).keywords
        with torch.no_grad():
            turn.in_forward = False
            cache = {"use_cache": False} if "use_cache" in in_parts else {}
            whole = _result(model(**{**few, **cache}), length)
            turn.in_forward, turn.asked = True, asked
            part = _result(model(**in_parts), length // line.size)
    finally:
        model.train(training)
        turn.asked = None
        turn.in_forward, turn.cut, cutter.cut = in_forward, cut, cut
    if whole is None or part is None:
        return
    joined = line.all_gather(part, dim=1)
    order = torch.cat([used.of_rank(length, rank) for rank in range(line.size)])
    found = torch.empty_like(joined)
    found[:, order.to(joined.device)] = joined
    # All ranks decide alike, on the largest difference that any of them sees.
    worst = float(line.all_gather(difference(found, whole).reshape(1)).max())
    if not worst <= bound_of(whole.dtype):
        raise ConfigError(
            f"{type(model).__name__} computes something else when ranks share its sequences: "
            f"results of {length} tokens differ by {worst:.1g} of the largest one. Something in it "
            "looks at other tokens, or numbers them, without attention that plugins can reach "
            "(Transformers' attention interface, drivetrain.attention) and position_ids"
            f"{_without(model, asked)}, so it cannot be trained with sequence_parallel_size; "
            "sequence_parallel.probe: false trains it all the same"
        )


def difference(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The largest difference, as a part of the largest number that was expected."""
    return (found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)


def bound_of(dtype: torch.dtype) -> float:
    """The largest difference that rounding explains."""
    return _BOUNDS.get(dtype, _LOW_PRECISION)


def _without(model: nn.Module, asked: set[nn.Module]) -> str:
    """Which repeated blocks have called no attention, in words; nothing if all have."""
    blocks = [unit for unit in units(model) if unit.module is not model]
    silent = [unit for unit in blocks if not asked & set(unit.module.modules())]
    if not silent:
        return ""
    first = silent[0]
    others = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
    return f" ({first.name}, a {type(first.module).__name__},{others} called none)"


def _result(output: Any, length: int) -> torch.Tensor | None:
    """The first tensor of an output that has something for each token."""
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            continue
        if leaf.dim() > 1 and leaf.shape[1] == length:
            return leaf
    return None
