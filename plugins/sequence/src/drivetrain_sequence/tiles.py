"""Token-wise functions computed a tile of tokens at a time, and again in backward (ALST)."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

from drivetrain.errors import ConfigError
from drivetrain.states.units import units
from drivetrain_sequence.in_place_of import InPlaceOf
from drivetrain_sequence.measured import MeasuredTile, aside
from drivetrain_sequence.probe import bound_of, difference

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_sequence.section import SequenceParallelSection


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

    Of its arguments, the first tensor of three dimensions or more has the tokens, [b, s, ...];
    other tensors [b, s, ...] are cut with it, and all else is handed on whole.

    Args:
        module: returns tensors [b, s, ...], one or several.
        tile: tokens of a row at a time, or what finds out how many.
        asked: what of the section says that the module is one of single tokens, and its name, where
            that is not known: its results for a few tokens are compared once with those in parts.
    """

    def __init__(
        self, module: nn.Module, tile: int | MeasuredTile, asked: str | None = None
    ) -> None:
        self._module: Any = module
        self._forward = module.forward
        self._tile = tile
        self._unknown = asked
        self.undo: Callable[[], None] = InPlaceOf(module, "forward", self).undo

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        leaves, spec = tree_flatten((arguments, keywords))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        first = next((x for x in tensors if x.dim() > 2), None)
        if first is None:
            return self._forward(*arguments, **keywords)
        places = [i for i, leaf in enumerate(leaves) if _is_of_tokens(leaf, first)]

        def run(*parts: torch.Tensor) -> Any:
            given = dict(zip(places, parts, strict=True))
            args, kwargs = tree_unflatten([given.get(i, x) for i, x in enumerate(leaves)], spec)
            return self._forward(*args, **kwargs)

        whole = [leaves[i] for i in places]
        tile = self._tile
        if first.shape[1] <= (tile if isinstance(tile, int) else 1):
            return self._forward(*arguments, **keywords)
        if self._unknown is not None and not first.is_meta:
            self._refuse_others(run, whole)
        if not isinstance(tile, int):
            tile = tile.along(self._module, run, whole)
        if first.shape[1] <= tile:
            return self._forward(*arguments, **keywords)
        pieces = zip(*(torch.split(x, tile, 1) for x in whole), strict=True)
        results = [
            checkpoint(run, *(x.contiguous() for x in piece), use_reentrant=False)
            for piece in pieces
        ]
        flat, shape = zip(*map(tree_flatten, results), strict=True)
        return tree_unflatten([torch.cat(parts, 1) for parts in zip(*flat, strict=True)], shape[0])

    def _refuse_others(self, run: Callable[..., Any], whole: list[torch.Tensor]) -> None:
        """Look once whether results of some tokens need no other tokens.

        Numbers are random, as those of a batch may be the same for many tokens (of padding), whose
        mean, for example, is then each of them.

        Raises:
            ConfigError: they do, or are not one for each token.
        """
        asked, self._unknown = self._unknown, None
        tokens = [_few(x, seed) for seed, x in enumerate(whole)]
        middle = tokens[0].shape[1] // 2
        sides = (slice(middle), slice(middle, None))
        try:
            with aside(self._module, whole[0].device):
                together = tree_leaves(run(*tokens))
                apart = [tree_leaves(run(*(x[:, side] for x in tokens))) for side in sides]
                alike = all(map(_are_alike, together, *apart))
        except RuntimeError as error:  # of shapes: dimension 1 is not of tokens
            raise self._other(asked) from error
        if not alike:
            raise self._other(asked)

    def _other(self, asked: str | None) -> ConfigError:
        return ConfigError(
            f"sequence_parallel.{asked}, a {type(self._module).__name__}, is not one of single "
            "tokens: what it returns for some depends on others, or is not [rows, tokens, ...]; "
            "leave it out"
        )


_FEW = 4
"""Tokens at most of the comparison of a module with itself in two parts."""


def _few(x: torch.Tensor, seed: int) -> torch.Tensor:
    """A few tokens like those of x [b, s, ...]; random where they are not whole numbers."""
    some = x[:, :_FEW]
    if not x.is_floating_point():
        return some
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(some.shape, generator=generator, device="cpu").to(x.device, x.dtype)


def _is_of_tokens(leaf: Any, first: torch.Tensor) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.shape[:2] == first.shape[:2]


def _are_alike(together: Any, *apart: Any) -> bool:
    if not all(isinstance(x, torch.Tensor) and x.dim() > 1 for x in (together, *apart)):
        return False
    joined = torch.cat(apart, 1)
    if joined.shape != together.shape:
        return False
    return bool(difference(joined, together) <= bound_of(together.dtype))


def tile_of(job: Job, section: SequenceParallelSection, key: str) -> int | MeasuredTile | None:
    """Tokens of the tiles of a key of the section, or what finds out how many; ``None`` if unset.

    One size is found for all modules of a key.
    """
    given: int | Literal["measured"] | None = getattr(section, key)
    return MeasuredTile(job, key) if given == "measured" else given


def tiled_modules(
    job: Job, module: nn.Module, section: SequenceParallelSection
) -> dict[nn.Module, tuple[int | MeasuredTile, str | None]]:
    """Which modules are computed in tiles: of how many tokens, and what asks, where it may err.

    Raises:
        ConfigError: the section asks for what the model does not have.
    """
    found: dict[nn.Module, tuple[int | MeasuredTile, str | None]] = {}
    kinds: dict[str, dict[nn.Module, str | None]] = {
        "mlp_tile": {part: None for unit in units(module) for part in mlps(unit.module)},
        # Some with these classes' names are norms of dimension 1 (of channels, before places).
        "norm_tile": {x: f"norm_tile: {n}" for n, x in module.named_modules() if _is_norm(x)},
    }
    what = {"mlp_tile": "multi-layer perceptron among the children of its repeated blocks"}
    for key, parts in kinds.items():
        tile = tile_of(job, section, key)
        if tile is None:
            continue
        if not parts:
            raise ConfigError(
                f"sequence_parallel.{key}: {type(module).__name__} has no {what.get(key, 'norm')}"
            )
        found |= {part: (tile, asked) for part, asked in parts.items()}
    for pattern, tokens in section.tiled_modules.items():
        named = [(n, part) for n, part in module.named_modules() if n and fnmatch(n, pattern)]
        if not named:
            raise ConfigError(
                f"sequence_parallel.tiled_modules: {type(module).__name__} has no module that is "
                f"called {pattern!r}"
            )
        found |= {part: (tokens, f"tiled_modules: {name}") for name, part in named}
    return found


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of the last dimension, by its class."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return len(module.normalized_shape) == 1  # of more, tokens are among them
    vectors = all(p.dim() == 1 for p in module.parameters())
    leaf = not any(True for _ in module.children())
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return leaf and named and vectors


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
