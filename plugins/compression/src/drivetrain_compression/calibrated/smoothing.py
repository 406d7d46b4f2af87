"""Scales that move from activations into weights: SmoothQuant and AWQ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Generic, Literal, TypeVar

import torch
from pydantic import Field

from drivetrain_compression.calibrated.grids import Integers, fit, round_to, weight_of
from drivetrain_compression.calibrated.modifiers import AfterTraining, GridConfig
from drivetrain_compression.calibrated.pairs import Called, Pair, pairs
from drivetrain_compression.calibrated.results import exact_products
from drivetrain_compression.calibrated.statistics import Inputs
from drivetrain_compression.recipe.modifier import CompressionUnit, ModifierConfig, Place

ConfigT = TypeVar("ConfigT", bound=ModifierConfig)


class Smoothing(AfterTraining[ConfigT], Generic[ConfigT]):
    """A method that scales pairs of modules against each other."""

    place = Place.SMOOTH
    norms_only = False
    called: Called

    def begin(self, units: Sequence[CompressionUnit]) -> None:
        super().begin(units)
        self.called = Called(units[0].module)

    def change(self, unit: CompressionUnit) -> None:
        self.called.close()
        if self.called.first is None:
            return
        found = pairs(unit, self.called.first, norms_only=self.norms_only)
        if not found:
            self.notes.append(f"{unit.name}: nothing found to move scales between")
        for pair in found:
            pair.scale(self.scales(pair, self.watch.of(pair.targets[0].name)))
        del self.called

    def scales(self, pair: Pair, inputs: Inputs) -> torch.Tensor:
        """By what the inputs [in] of a pair's layers are divided."""
        raise NotImplementedError


class SmoothQuantConfig(ModifierConfig):
    """SmoothQuant."""

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = Field(
        default="search",
        description="How much of the range moves; 0.5 shares it, and `search` tries for each pair.",
    )
    layers: bool = Field(
        default=True, description="Move scales between two layers, too, not only from norms."
    )
    steps: int = Field(default=11, ge=2, description="Exponents that a search tries.")


class SmoothQuant(Smoothing[SmoothQuantConfig]):
    """SmoothQuant (arXiv 2211.10438): outliers of activations move into weights.

    With ``alpha`` 0.5 and from norms alone it is the paper's. A search takes the exponent, for each
    pair, with which layers of 8 bits (a scale for each row and token) are off least on some tokens
    of the data. It tries typical sizes in place of the largest, too, as those may be of one token.
    """

    config_class = SmoothQuantConfig

    def __init__(self, config: SmoothQuantConfig, label: str) -> None:
        super().__init__(config, label)
        self.norms_only = not config.layers
        self.gathers = "tokens" if config.alpha == "search" else "sizes"  # type: ignore[misc]

    def scales(self, pair: Pair, inputs: Inputs) -> torch.Tensor:
        weights = _weights(pair)
        weight, alpha = weights.abs().amax(0).clamp(min=1e-5), self.config.alpha
        if isinstance(alpha, float):
            return _shared(inputs.top, weight, alpha)
        x, steps = inputs.kept, self.config.steps
        wanted = x @ weights.T
        size = wanted.square().sum(1, keepdim=True).clamp(min=1e-30)
        typical = inputs.squares.sqrt()
        best, least = torch.ones_like(weight), float("inf")
        for by in (
            best,
            *(
                _shared(tops, weight, step / (steps - 1))
                for tops in (inputs.top, typical)
                for step in range(steps)
            ),
        ):
            off = _in_int8(x / by, weights * by) - wanted
            loss = float((off.square() / size).sum())  # each token by its own size
            if loss < least:
                best, least = by, loss
        return best


def _shared(top: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """SmoothQuant's scale of each feature [in]."""
    return (top.clamp(min=1e-5).pow(alpha) / weight.pow(1 - alpha)).clamp(min=1e-5)


def _in_int8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a layer of 8 bits makes of tokens [n, in]: [n, out]."""
    grid = Integers(8)
    near = fit(weight, grid)
    top = x.abs().amax(1, keepdim=True)
    scale, _ = grid.ranges(-top, top)
    with exact_products():  # codes are whole numbers that bfloat16 has
        found = grid.nearest(x / scale) @ round_to(weight, grid, near).T
    return found * scale * near.scale.T


class AwqConfig(GridConfig):
    """AWQ's search for scales, for the grid that a later modifier rounds to."""

    steps: int = Field(default=20, ge=2, description="Exponents that are tried.")


class Awq(Smoothing[AwqConfig]):
    """AWQ (arXiv 2306.00978): inputs that matter get finer steps, found by search.

    The error of a choice is that of the layers' outputs on all of the data, by its gram matrix.
    """

    config_class = AwqConfig
    gathers = "gram"

    def scales(self, pair: Pair, inputs: Inputs) -> torch.Tensor:
        weight, gram, config = _weights(pair), inputs.gram, self.config
        grid, size = config.grid(), inputs.mean.clamp(min=1e-8)
        best, least = torch.ones_like(size), float("inf")
        for step in range(config.steps):
            by = size.pow(step / config.steps).clamp(min=1e-4)
            by = by / (by.max() * by.min()).sqrt()
            scaled = weight * by
            near = fit(scaled, grid, config.group)
            off = weight - weight_of(round_to(scaled, grid, near), near) / by
            with exact_products():
                loss = float(torch.sum(off @ gram * off))
            if loss < least:
                best, least = by, loss
        return best


def _weights(pair: Pair) -> torch.Tensor:
    every = [target.module.weight.detach().float() for target in pair.targets]  # type: ignore[operator]
    return torch.cat(every)
