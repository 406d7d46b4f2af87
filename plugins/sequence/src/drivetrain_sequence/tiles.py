"""Token-wise functions computed a tile of tokens at a time, and again in backward (ALST)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def in_tiles(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tile: int, dim: int = 1
) -> torch.Tensor:
    """``function(x)`` for a function of single tokens, with one tile's activations in memory.

    Args:
        function: from [.., n, ..] to [.., n, ..], each token for itself.
        x: the tokens.
        tile: how many along ``dim`` at a time.
        dim: which dimension the tokens are.
    """
    if x.shape[dim] <= tile:
        return function(x)
    parts = [
        checkpoint(function, part.contiguous(), use_reentrant=False)
        for part in torch.split(x, tile, dim)
    ]
    return torch.cat(parts, dim)


class TiledModule:
    """Replaces the ``forward`` of a module of single tokens.

    Args:
        module: takes and returns [b, s, width].
        tile: tokens of a row at a time.
    """

    def __init__(self, module: nn.Module, tile: int) -> None:
        self._module: Any = module
        self._forward = module.forward
        self._tile = tile
        self._module.forward = self

    def __call__(self, x: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        if x.dim() != 3 or arguments or keywords:
            return self._forward(x, *arguments, **keywords)
        return in_tiles(self._forward, x, self._tile)

    def undo(self) -> None:
        """Give the module its forward back."""
        del self._module.forward


def mlps(block: nn.Module) -> list[nn.Module]:
    """The children of a repeated block that are multi-layer perceptrons, by what they are made of.

    They hold at least two matrices and an activation, and nothing else that could mix tokens.
    """
    return [child for child in block.children() if _is_mlp(child)]


def _is_mlp(module: nn.Module) -> bool:
    leaves = [part for part in module.modules() if not any(True for _ in part.children())]
    matrices = [p for p in module.parameters() if p.dim() == 2]
    activations = [leaf for leaf in leaves if not isinstance(leaf, _TOKEN_WISE) and _is_bare(leaf)]
    return len(matrices) > 1 and bool(activations) and all(map(_is_token_wise, leaves))


def _is_bare(leaf: nn.Module) -> bool:
    return not any(True for _ in leaf.parameters()) and not any(True for _ in leaf.buffers())


_TOKEN_WISE = (nn.Linear, nn.Dropout, nn.LayerNorm, nn.RMSNorm, nn.Identity)


def _is_token_wise(leaf: nn.Module) -> bool:
    if isinstance(leaf, _TOKEN_WISE):
        return True
    own = list(leaf.parameters(recurse=False))
    # Matrices of other classes with a bias are linear layers, too, if they say their widths.
    return _is_bare(leaf) or (0 < len(own) <= 2 and {"nf", "nx"} <= vars(leaf).keys())
