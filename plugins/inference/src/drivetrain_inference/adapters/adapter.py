"""Low-rank changes of layers (LoRA, arXiv 2106.09685), for some rows of a forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import torch
from torch import nn

from drivetrain.errors import ConfigError

_numbers = count(1)


@dataclass(frozen=True, eq=False)
class Adapter:
    """What is added to the results of layers.

    Args:
        name: how requests choose it.
        pairs: of a layer, two matrices [rank, in] and [out, rank]; the second one has the scale.
        salt: tells apart whose keys and values a block of the cache has; never used again.
    """

    name: str
    pairs: Mapping[nn.Module, tuple[torch.Tensor, torch.Tensor]]
    salt: bytes = field(default_factory=lambda: b"adapter %d/" % next(_numbers))


Group = tuple[Adapter, torch.Tensor | None]
"""An adapter, and the rows [rows], int64, of a forward that it changes; ``None`` for all."""

Part = tuple[nn.Module, int, int]
"""A layer, and the columns of a joined result that are its own."""


def groups_of(owners: Sequence[Adapter | None], device: torch.device) -> tuple[Group, ...]:
    """Rows by adapter, of the adapter of each row; empty if there is none."""
    found = {each: None for each in owners if each is not None}
    if len(found) == 1 and None not in owners:
        return ((next(iter(found)), None),)
    return tuple(
        (each, torch.tensor([row for row, own in enumerate(owners) if own is each], device=device))
        for each in found
    )


def add_changes(
    y: torch.Tensor, x: torch.Tensor, parts: Sequence[Part], groups: Sequence[Group]
) -> None:
    """Add to results ``y`` [rows, out] of layers what adapters make of ``x`` [rows, in]."""
    for adapter, rows in groups:
        for layer, start, stop in parts:
            pair = adapter.pairs.get(layer)
            if pair is None:
                continue
            down, up = pair
            own = x if rows is None else x[rows]
            change = (own @ down.T) @ up.T
            if rows is None:
                y[:, start:stop] += change
            else:
                y[rows, start:stop] += change


@contextmanager
def adapted(groups: Sequence[Group], tokens: int) -> Iterator[None]:
    """Have the modules' own code compute with adapters, where ``tokens`` rows pass each layer.

    Raises:
        ConfigError: from within, if other numbers of rows pass a layer, as in experts.
    """
    layers = {layer for adapter, _ in groups for layer in adapter.pairs}
    hook = partial(_changed, groups, tokens)
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _changed(
    groups: Sequence[Group],
    tokens: int,
    layer: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    x, y = inputs[0], output.clone()
    rows, flat = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if len(rows) != tokens:
        raise ConfigError(
            f"an adapter changes a {type(layer).__name__} that {len(rows)} of {tokens} tokens "
            "pass, so which request a row belongs to is not known; merge the adapter into the model"
        )
    add_changes(flat, rows, ((layer, 0, flat.shape[1]),), groups)
    return y
