"""Train with blocks of weights left out, chosen by weights and gradients over all of the model.

A block's score is the mean of ``|w| m``, where m is a running sum of its gradients' magnitudes,
``m = 0.9 m + |g|``: the sensitivity of Lee et al. 2018, "SNIP", arXiv:1810.02340, section 4, with
momentum. What is zero grows by the cubic schedule of Zhu and Gupta 2017, arXiv:1710.01878,
equation 1, from the offset to its end. Gradients are those of each rank, and magnitudes are summed
over ranks when blocks are chosen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import nn

from drivetrain.contracts import Float, NonNegativeInt, Op, PositiveInt
from drivetrain.errors import ConfigError
from drivetrain_compression.pruned.scores import largest
from drivetrain_compression.recipe.modifier import Place, Progress, Target
from drivetrain_compression.training.base import TrainingConfig, TrainingModifier
from drivetrain_compression.training.chain import Step

MASK = "block_pruning_mask"
"""Buffer of a module: what is kept, booleans of the weight's shape."""

DECAY = 0.9


class BlockPruningConfig(TrainingConfig):
    """How much is left out, in which blocks, and when."""

    schedule_offset_end: NonNegativeInt | None = Field(
        default=None, description="Step at which all zeros are there; the offset by default."
    )
    schedule_offset_stride: PositiveInt = Field(
        default=1, description="Steps from one choice of blocks to the next."
    )
    block_pattern: str = Field(
        default="4x1",
        description="NxM: blocks of N outputs and M inputs; N:M: N zeros in M inputs.",
    )
    dense_ratio: Float = Field(default=0.1, gt=0, lt=1, description="Share of weights kept.")

    @model_validator(mode="after")
    def _pattern_makes_sense(self) -> BlockPruningConfig:
        found = re.fullmatch(r"([1-9]\d*)([x:])([1-9]\d*)", self.block_pattern)
        if not found:
            raise ValueError(f"block_pattern {self.block_pattern!r} is neither NxM nor N:M")
        if found[2] == ":" and int(found[1]) >= int(found[3]):
            raise ValueError(
                f"block_pattern {self.block_pattern} leaves no weight out of {found[3]}"
            )
        if self.end < self.schedule_offset:
            raise ValueError(f"schedule_offset_end {self.end} is before schedule_offset")
        return self

    @property
    def end(self) -> int:
        """Step at which all zeros are there."""
        end = self.schedule_offset_end
        return self.schedule_offset if end is None else end

    @property
    def within(self) -> bool:
        """Whether zeros are N of every M inputs, rather than whole blocks."""
        return ":" in self.block_pattern

    @property
    def sizes(self) -> tuple[int, int]:
        """The two numbers of the pattern."""
        first, second = re.split("[x:]", self.block_pattern)
        return int(first), int(second)


class BlockStep(Step):
    """Sets what is not kept to zero."""

    order = 20

    def weight(self, module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """The weight, zero where the mask is."""
        mask: Any = module._buffers[MASK]
        return torch.where(mask, weight, 0.0)


class BlockPruning(TrainingModifier[BlockPruningConfig]):
    """Blocks of weights that are zero, chosen while training goes on."""

    config_class = BlockPruningConfig
    place = Place.PRUNE
    takes = (nn.Linear,)
    claims = "zeros"

    def __init__(self, config: BlockPruningConfig, label: str) -> None:
        super().__init__(config, label)
        self._momentum: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}

    def make_step(self, target: Target) -> BlockStep:
        """Check that blocks divide the weight."""
        weight: Any = target.module.weight
        outputs, inputs = weight.shape
        first, second = self.config.sizes
        if inputs % second or (not self.config.within and outputs % first):
            raise ConfigError(
                f"{self.label}: {target.name}.weight {[outputs, inputs]} is not divided by the "
                f"pattern {self.config.block_pattern}; nothing is padded: exclude it"
            )
        device = "cpu" if weight.device.type == "meta" else weight.device
        mask = torch.ones(outputs, inputs, dtype=torch.bool, device=device)
        target.module.register_buffer(MASK, mask)
        return BlockStep(self.label)

    def watch(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Note the magnitude of this rank's gradient of a weight."""
        if not self._names:
            weights = ((t.name, t.module._parameters["weight"]) for t in self.targets)
            self._names = {id(weight): name for name, weight in weights}
        name = self._names.get(id(parameter))
        if name is None or gradient.numel() != parameter.numel():
            return
        size = gradient.detach().abs().float().view(parameter.shape)
        held = self._momentum.get(name)
        self._momentum[name] = size if held is None else held.mul_(DECAY).add_(size)

    def sparsity(self, steps: int) -> float:
        """Share of zeros wanted after so many steps."""
        config = self.config
        final = 1 - config.dense_ratio
        if config.end == config.schedule_offset:
            return final
        share = (steps - config.schedule_offset) / (config.end - config.schedule_offset)
        return final * (1 - (1 - min(share, 1.0)) ** 3)

    def complete(self) -> None:
        """Choose the last blocks, unless some were loaded."""
        super().complete()
        masks: list[Any] = [target.module._buffers[MASK] for target in self.targets]
        if all(bool(mask.all()) for mask in masks):
            self.advance(Progress(self.config.end))

    def advance(self, progress: Progress) -> None:
        """Choose blocks again, when it is time. Collective."""
        config = self.config
        since = progress.steps - config.schedule_offset
        if progress.steps > config.end or (
            since % config.schedule_offset_stride and progress.steps != config.end
        ):
            return
        scores = [self._scores(target) for target in self.targets]
        if config.within:
            masks = [self._within(score) for score in scores]
        else:
            masks = self._over_all(scores, 1 - self.sparsity(progress.steps))
        for target, mask in zip(self.targets, masks, strict=True):
            kept: Any = target.module._buffers[MASK]
            kept.copy_(mask)

    def _scores(self, target: Target) -> torch.Tensor:
        with self.whole([target.module]), torch.no_grad():
            weight: Any = target.module._parameters["weight"]
            size: torch.Tensor = weight.abs().float()
        momentum = self._momentum.get(target.name)
        seen = torch.zeros_like(size) if momentum is None else momentum.to(size.device).clone()
        self.over_ranks(seen, Op.SUM, "magnitudes of gradients")
        return size * seen if bool(seen.any()) else size

    def _within(self, score: torch.Tensor) -> torch.Tensor:
        zeros, among = self.config.sizes
        groups = score.view(-1, among)
        order = torch.sort(groups, dim=1, descending=True, stable=True).indices
        mask = torch.zeros_like(groups, dtype=torch.bool)
        mask.scatter_(1, order[:, : among - zeros], True)
        return mask.view(score.shape)

    def _over_all(self, scores: list[torch.Tensor], ratio: float) -> list[torch.Tensor]:
        rows, columns = self.config.sizes
        blocks = [
            s.view(s.shape[0] // rows, rows, s.shape[1] // columns, columns).mean(dim=(1, 3))
            for s in scores
        ]
        kept = largest(torch.cat([b.reshape(-1) for b in blocks]), ratio)
        parts = torch.split(kept, [b.numel() for b in blocks])
        return [
            part.view(b.shape).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            for part, b in zip(parts, blocks, strict=True)
        ]

    def bake(self, target: Target) -> None:
        """Put zeros into the weight, and take the mask away."""
        mask: Any = target.module._buffers.pop(MASK)
        if self.started:
            weight: Any = target.module._parameters["weight"]
            with torch.no_grad():
                weight.masked_fill_(~mask, 0.0)

    def state(self) -> dict[str, Any]:
        """Running sums are no state: they have faded after some steps, and are of one rank."""
        return super().state()

    def describe(self) -> Iterator[str]:
        """Pattern, share and end."""
        yield from super().describe()
        config = self.config
        share = (
            "" if config.within else f", {config.dense_ratio:.0%} kept from step {config.end} on"
        )
        yield f"pattern {config.block_pattern}{share}"
