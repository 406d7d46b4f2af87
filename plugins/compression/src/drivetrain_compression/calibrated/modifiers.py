"""What methods after training have in common, and those that only choose numbers for weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_compression.calibrated.data_free import hqq, low_rank
from drivetrain_compression.calibrated.gptq import (
    Inverse,
    Order,
    SingularError,
    damped,
    gptq,
    held_damping,
    invert,
)
from drivetrain_compression.calibrated.grids import (
    Floats,
    Grid,
    Integers,
    Scales,
    fit,
    fit_by_error,
    round_to,
    stored,
    weight_of,
)
from drivetrain_compression.calibrated.refining import refine
from drivetrain_compression.calibrated.results import ACTIVATIONS, Rounded, exact_products, put
from drivetrain_compression.calibrated.statistics import Inputs, Watch
from drivetrain_compression.recipe.modifier import (
    CompressionUnit,
    Modifier,
    ModifierConfig,
    Place,
    Progress,
    Target,
)

ConfigT = TypeVar("ConfigT", bound=ModifierConfig)

_GRAMS = ("gram", "grams")


class AfterTraining(Modifier[ConfigT], Generic[ConfigT]):
    """A method that sees one block at a time, with the data that passes through it.

    Class attributes:
        gathers: ``"gram"``, ``"grams"`` (some batches apart), ``"sizes"``, ``"tokens"`` (sizes,
            and some tokens as they are), or ``""``: needs no data.
        batches: how many of the data it has to see; ``None``: all.

    Attributes:
        results: what was chosen for layers of the current block, by name.
        notes: what the user should know, one line each.
    """

    gathers: ClassVar[str] = ""
    batches: ClassVar[int | None] = None
    watch: Watch

    def __init__(self, config: ConfigT, label: str) -> None:
        super().__init__(config, label)
        self.results: dict[str, Rounded] = {}
        self.notes: list[str] = []

    def begin(self, units: Sequence[CompressionUnit]) -> None:
        self.results = {}
        for target in units[0].targets:
            self.check(target)
        if self.gathers:
            self.watch = Watch(
                units[0].targets,
                gram=self.gathers in _GRAMS,
                keep=self.gathers == "tokens",
                split=self.gathers == "grams",
            )

    def step(self, progress: Progress) -> None:
        self.watch.next()

    def finish(self, units: Sequence[CompressionUnit]) -> None:
        if self.gathers:
            self.watch.close()
        with torch.no_grad():
            self.change(units[0])
        if self.gathers:
            del self.watch

    def check(self, target: Target) -> None:
        """Refuse a layer that the method cannot change.

        Raises:
            ConfigError: says which and why.
        """
        weight: Any = target.module.weight
        if not torch.isfinite(weight).all():
            raise ConfigError(f"{self.label}: the weight of {target.name} has NaN or infinity")

    def change(self, unit: CompressionUnit) -> None:
        """Change the layers of a block, when all data has passed."""
        raise NotImplementedError

    def together(self, unit: CompressionUnit) -> list[list[Target]]:
        """Layers of a block in groups that get the same input."""
        by_name = {target.name: target for target in unit.targets}
        return [[by_name[name] for name in names] for names in self.watch.shared(list(by_name))]


class GridConfig(ModifierConfig):
    """Which grid weights are rounded to."""

    bits: int = Field(default=4, ge=2, le=8, description="Bits of a weight.")
    format: str = Field(
        default="", description="A small float instead of integers: e2m1, e3m0, e3m2."
    )
    group: int = Field(
        default=0, ge=0, description="Inputs that share a scale; 0: all of an output's."
    )
    symmetric: bool = Field(default=True, description="No zero point.")
    activations: Literal["", "int8", "e4m3"] = Field(
        default="", description="Round inputs, too, with a scale for each token when it comes."
    )
    activation_scales: Literal["token", "static"] = Field(
        default="token",
        description="Scales of inputs: each token's own, or one a layer, from the largest on the "
        "data (ZeroQuant-HERO's static scheme).",
    )
    scale_ratios: Literal["", "m1", "m2"] = Field(
        default="", description="Small floats: scales (m1) or their ratios (m2) are powers of two."
    )
    low_rank: int = Field(default=0, ge=0, description="Rank of a term for what was lost (LoRC).")

    @model_validator(mode="after")
    def _static_inputs_are_rounded(self) -> Self:
        if self.activation_scales == "static" and not self.activations:
            raise ValueError("activation_scales: static needs activations to round, and has none")
        return self

    def grid(self) -> Grid:
        """The numbers."""
        if self.format:
            return Floats(self.format, self.scale_ratios)
        return Integers(self.bits, self.symmetric)


GridConfigT = TypeVar("GridConfigT", bound=GridConfig)


class Quantiser(AfterTraining[GridConfigT], Generic[GridConfigT]):
    """A method that chooses numbers of a grid."""

    place = Place.QUANTISE
    claims = "weight bits"

    def __init__(self, config: GridConfigT, label: str) -> None:
        super().__init__(config, label)
        if config.activation_scales == "static" and not self.gathers:
            self.gathers = "sizes"  # type: ignore[misc]

    def change(self, unit: CompressionUnit) -> None:
        groups = self.together(unit) if self.gathers else [[t] for t in unit.targets]
        for targets in groups:
            inputs = self.watch.of(targets[0].name) if self.gathers else None
            self._round(targets, inputs)

    def numbers(
        self, weight: torch.Tensor, grid: Grid, dtype: torch.dtype, inputs: Inputs | None
    ) -> tuple[torch.Tensor, Scales]:
        """Choose for a weight [out, in], float32, whose scales will be stored in ``dtype``.

        Args:
            weight: of layers of one input, one below the other.
            grid: of numbers.
            dtype: of scales.
            inputs: with gram matrices, if the method gathers them; else ``None``.
        """
        raise NotImplementedError

    def _round(self, targets: Sequence[Target], inputs: Inputs | None) -> None:
        modules: list[nn.Linear] = [t.module for t in targets]  # type: ignore[misc]
        weight = torch.cat([module.weight.detach() for module in modules]).float()
        grid, dtype = self.config.grid(), modules[0].weight.dtype
        known = inputs if self.gathers in _GRAMS else None
        try:
            numbers, scales = self.numbers(weight, grid, dtype, known)
        except SingularError as error:
            raise ConfigError(f"{self.label}: {targets[0].name}: {error}") from error
        # It is made anew each time, so not before the one that numbers were chosen by is gone.
        hessian = None if known is None else known.gram
        start = 0
        for target, module in zip(targets, modules, strict=True):
            rows = slice(start, start + module.out_features)
            start = rows.stop
            part = Scales(scales.scale[rows], scales.zero[rows], scales.group)
            found = self._with_rest(weight[rows], Rounded(numbers[rows], part, grid))
            lost = None if hessian is None else _error(weight[rows], found, hessian)
            scale = None if inputs is None else self.input_scale(inputs, dtype)
            found = replace(
                found, activations=self.config.activations, error=lost, input_scale=scale
            )
            put(module, found)
            self.results[target.name] = found

    def input_scale(self, inputs: Inputs, dtype: torch.dtype) -> float | None:
        """The scale of all inputs, as a file has it in ``dtype``; ``None``: each token its own."""
        if self.config.activation_scales == "token":
            return None
        top = inputs.top.amax()
        scale, _ = ACTIVATIONS[self.config.activations].ranges(-top, top)
        return max(float(scale.to(dtype)), _least(dtype))

    def _with_rest(self, weight: torch.Tensor, found: Rounded) -> Rounded:
        if not self.config.low_rank:
            return found
        rest = low_rank(weight - found.weight(weight.dtype), self.config.low_rank)
        return Rounded(found.numbers, found.scales, found.grid, low_rank=rest)


class RoundConfig(GridConfig):
    """Round each weight to the nearest number."""

    clip: bool = Field(
        default=False, description="Cut ranges so that outputs on the data change least."
    )


class Round(Quantiser[RoundConfig]):
    """Rounds to nearest: ZeroQuant without distillation, ZeroQuant-FP, FP6; and AWQ's clipping."""

    config_class = RoundConfig

    def __init__(self, config: RoundConfig, label: str) -> None:
        super().__init__(config, label)
        if config.clip:
            self.gathers = "gram"  # type: ignore[misc]

    def numbers(
        self, weight: torch.Tensor, grid: Grid, dtype: torch.dtype, inputs: Inputs | None
    ) -> tuple[torch.Tensor, Scales]:
        group = self.config.group
        found = fit(weight, grid, group)
        if inputs is not None:
            found = fit_by_error(weight, grid, group, inputs.gram)
        scales = stored(found, dtype)
        return round_to(weight, grid, scales), scales


class HqqConfig(GridConfig):
    """Half-quadratic quantisation."""

    power: float = Field(default=0.7, gt=0, le=1, description="Of the error that is made small.")
    steps: int = Field(default=20, ge=1, description="Of optimisation.")


class Hqq(Quantiser[HqqConfig]):
    """HQQ: scales that forgive outliers; needs no data."""

    config_class = HqqConfig

    def numbers(
        self, weight: torch.Tensor, grid: Grid, dtype: torch.dtype, inputs: Inputs | None
    ) -> tuple[torch.Tensor, Scales]:
        config = self.config
        found = hqq(weight, grid, config.group, power=config.power, steps=config.steps)
        scales = stored(found, dtype)
        return round_to(weight, grid, scales), scales


Damping = Annotated[float, Field(gt=0, le=1)] | Literal["search"]
DAMPING = (
    "Share of the mean diagonal; `search` takes that of each layer which does best on every fourth "
    "batch of the data, fitted to the others (0.01, 0.03, 0.1 or 0.3)."
)


class GptqConfig(GridConfig):
    """GPTQ."""

    damping: Damping = Field(default=0.01, description=DAMPING)
    act_order: bool = Field(default=True, description="Round inputs with large activations first.")
    block: int = Field(default=128, ge=1, description="Columns between updates of the rest.")
    clip: bool = Field(default=True, description="Cut ranges so that outputs change least.")
    sweeps: int = Field(
        default=0,
        ge=0,
        description="Times that scales are fitted to the numbers, and numbers chosen again.",
    )


class Gptq(Quantiser[GptqConfig]):
    """GPTQ: each column's error is made up for by those that come later.

    With ``sweeps`` all columns are chosen again then, each for what the others have become.
    """

    config_class = GptqConfig

    def __init__(self, config: GptqConfig, label: str) -> None:
        super().__init__(config, label)
        self.gathers = "grams" if config.damping == "search" else "gram"  # type: ignore[misc]

    def numbers(
        self, weight: torch.Tensor, grid: Grid, dtype: torch.dtype, inputs: Inputs | None
    ) -> tuple[torch.Tensor, Scales]:
        assert inputs is not None
        config, hessian = self.config, inputs.gram
        found = fit(weight, grid, config.group)
        if config.clip:
            found = fit_by_error(weight, grid, config.group, hessian)
        scales = stored(found, dtype)

        def chosen(rows: slice, hessian: torch.Tensor, share: float) -> tuple[Inverse, Any, Scales]:
            order = Order.by_activity(hessian) if config.act_order else Order()
            inverse = invert(order.of(hessian, 0, 1), share)
            own = Scales(scales.scale[rows], scales.zero[rows], scales.group)
            numbers = gptq(weight[rows], inverse, grid, own, order=order, block=config.block)
            return inverse, numbers, own

        def changed(rows: slice, hessian: torch.Tensor, share: float) -> torch.Tensor:
            _, numbers, own = chosen(rows, hessian, share)
            return weight_of(numbers, own)

        share = config.damping
        if share == "search":
            share = held_damping(weight, inputs.parts, changed)
        inverse, numbers, _ = chosen(slice(None), hessian, share)
        if inverse.damping > share:
            self.notes.append(f"damped by {inverse.damping:g} instead of {share:g}")
        if not config.sweeps:
            return numbers, scales
        return refine(
            weight * (hessian.diagonal() != 0),  # what no sample touched is 0, and stays so
            numbers,
            damped(hessian, inverse.damping),
            grid,
            scales,
            dtype,
            sweeps=config.sweeps,
            block=config.block,
        )


def _least(dtype: torch.dtype) -> float:
    """The smallest positive number of ``dtype`` that is a normal number of float32, too.

    Devices may take subnormal numbers of float32 for 0, and 0 / 0 is NaN.
    """
    info = torch.finfo(dtype)
    return max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)


def _error(weight: torch.Tensor, found: Rounded, hessian: torch.Tensor) -> float:
    """Size of the change of the output, relative to the output."""
    off = weight - found.weight(weight.dtype)
    with exact_products():
        lost = torch.sum(off @ hessian * off)
        whole = torch.sum(weight @ hessian * weight)
    return float((lost / whole.clamp(min=1e-30)).clamp(min=0).sqrt())


__all__ = ["AfterTraining", "Gptq", "Hqq", "Quantiser", "Round", "weight_of"]
