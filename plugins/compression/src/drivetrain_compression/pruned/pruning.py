"""Train with parts of weights left out: single numbers, rows, heads, channels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from drivetrain.contracts import Float, PositiveInt
from drivetrain.errors import ConfigError
from drivetrain_compression.pruned.cleaning import (
    keep_inputs,
    keep_outputs,
    keep_rows_of_heads,
)
from drivetrain_compression.pruned.scores import largest, learned_mask
from drivetrain_compression.recipe.modifier import Place, Target
from drivetrain_compression.recipe.recipe import matching
from drivetrain_compression.training.base import TrainingConfig, TrainingModifier
from drivetrain_compression.training.chain import Step, compress_module, remove_steps

Sizable = (nn.Linear, nn.Conv2d, nn.BatchNorm2d)
"""What loses dimensions when another module loses rows, heads or channels."""


class PruningConfig(TrainingConfig):
    """How much is kept, and by what it is chosen."""

    dense_ratio: Float = Field(gt=0, le=1, description="Share that is kept, above 0.")
    method: Literal["l1", "topk"] = Field(
        default="l1",
        description="By magnitude when the method begins (l1), or by scores that are trained "
        "(topk).",
    )


class HeadPruningConfig(PruningConfig):
    """How many heads are kept."""

    num_heads: PositiveInt = Field(description="Heads of each attention.")


class PruningStep(Step):
    """Multiplies weight and bias by a mask.

    Args:
        owner: label of the modifier.
        pruning: the modifier; its class says what a mask is of.
        module: has the mask or the scores; the module itself, or one that it is related to.
    """

    def __init__(self, owner: str, pruning: Pruning, module: nn.Module) -> None:
        super().__init__(owner)
        self.module = module
        self._pruning_class, self._config = type(pruning), pruning.config
        self.order = pruning.order

    def mask(self) -> torch.Tensor:
        """The mask, one number for each part."""
        kind, module = self._pruning_class, self.module
        scores = module._parameters.get(kind.scores_name)
        if scores is not None:
            return learned_mask(scores, self._config.dense_ratio)
        mask: Any = module._buffers[kind.mask_name]
        return mask  # type: ignore[no-any-return]

    def weight(self, module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """The weight, zero where the mask is."""
        return _masked(weight, self._pruning_class.over_weight(self.mask(), module, weight))

    def bias(self, module: nn.Module, bias: torch.Tensor) -> torch.Tensor:
        """The bias, zero where all that it is added to is zero."""
        mask = self._pruning_class.over_bias(self.mask(), bias)
        return bias if mask is None else _masked(bias, mask)


def _masked(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:  # what autograd keeps is the mask itself, a byte for each number
        return torch.where(mask, tensor, 0.0)
    return tensor * mask.to(tensor.dtype)


class Pruning(TrainingModifier[PruningConfig]):
    """What the kinds of pruning share.

    Class attributes:
        mask_name: buffer of a module.
        scores_name: parameter of a module.
        order: of its steps.
    """

    config_class: ClassVar[type[PruningConfig]] = PruningConfig
    place = Place.PRUNE
    mask_name: ClassVar[str]
    scores_name: ClassVar[str]
    order: ClassVar[int]

    def __init__(self, config: PruningConfig, label: str) -> None:
        super().__init__(config, label)
        self.norms: list[Target] = []

    @classmethod
    def parts(cls, module: nn.Module, config: Any) -> tuple[int, ...]:
        """Shape of mask and scores."""
        raise NotImplementedError

    @classmethod
    def over_weight(
        cls, mask: torch.Tensor, module: nn.Module, weight: torch.Tensor
    ) -> torch.Tensor:
        """The mask in the shape of the weight, or one that broadcasts to it."""
        raise NotImplementedError

    @classmethod
    def over_bias(cls, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor | None:
        """The mask in the shape of the bias, if it has one."""
        return mask.reshape(-1)

    @classmethod
    def magnitudes(cls, module: nn.Module, weight: torch.Tensor, config: Any) -> torch.Tensor:
        """L1 norms of the parts, of the shape of the mask."""
        raise NotImplementedError

    def check(self, target: Target) -> None:
        """Refuse modules that have no such parts."""

    def make_step(self, target: Target) -> Step:
        """Give the module a mask, or scores to learn; related batch norms share it."""
        self.check(target)
        module = target.module
        weight: Any = module.weight
        if self.mask_name in module._buffers or self.scores_name in module._parameters:
            raise ConfigError(
                f"{self.label}: {target.name} is pruned by another group already; a module belongs "
                "to one group of a method"
            )
        shape = self.parts(module, self.config)
        if self.config.method == "topk":
            if weight.device.type == "meta":
                raise ConfigError(
                    f"{self.label}: {target.name} has no memory yet (device meta), and learned "
                    "scores (topk) need values: give the model memory, or use l1"
                )
            scores = nn.Parameter(_kaiming(shape, f"{target.name}.{self.scores_name}").to(weight))
            module.register_parameter(self.scores_name, scores)
        else:
            device = "cpu" if weight.device.type == "meta" else weight.device
            mask = torch.ones(shape, dtype=torch.bool, device=device)
            module.register_buffer(self.mask_name, mask)
        return PruningStep(self.label, self, module)

    def relate(self, model: nn.Module) -> None:
        """Mask batch norms that are related to a target, so that a channel is zero behind them."""
        for target, related in self.related(model):
            for other in related:
                if isinstance(other.module, nn.BatchNorm2d):
                    step = PruningStep(self.label, self, target.module)
                    compress_module(other.module, other.name).add(step)
                    self.norms.append(other)

    def move_to(self, model: nn.Module) -> None:
        """Work on a copy of the model, related norms included."""
        super().move_to(model)
        self.norms = [norm.in_copy(model) for norm in self.norms]

    def activate(self) -> None:
        """Let the steps take part, those of related norms too."""
        super().activate()
        for norm in self.norms:
            for step in compress_module(norm.module, norm.name).steps:
                step.active |= step.owner == self.label

    def start(self) -> None:
        """Choose what is kept by magnitude; collective where weights are sharded."""
        if self.config.method != "l1":
            return
        for target in self.targets:
            mask: Any = target.module._buffers[self.mask_name]
            if not bool(mask.all()):
                continue  # loaded
            with self.whole([target.module]), torch.no_grad():
                weight: Any = target.module._parameters["weight"]
                exact = weight if weight.dtype == torch.float64 else weight.float()
                if not bool(torch.isfinite(exact).all()):
                    raise ConfigError(f"{target.name}.weight has numbers that are not finite")
                scores = self.magnitudes(target.module, exact.abs(), self.config)
                mask.copy_(largest(scores, self.config.dense_ratio))

    def related(self, model: nn.Module) -> list[tuple[Target, list[Target]]]:
        """Each target with the modules that lose dimensions with it.

        Raises:
            ConfigError: patterns match another number of modules than there are targets.
        """
        patterns = self.config.related_modules
        if patterns is None:
            return []
        if len(patterns) != len(self.config.modules):
            raise ConfigError(
                f"{self.label}: related_modules has {len(patterns)} lists for "
                f"{len(self.config.modules)} patterns of modules; give one for each"
            )
        found = []
        for pattern, others in zip(self.config.modules, patterns, strict=True):
            names = {t.name for t in matching(model, [pattern], self.takes, self.label)}
            own = [target for target in self.targets if target.name in names]
            columns = [matching(model, [other], Sizable, self.label) for other in others]
            for other, column in zip(others, columns, strict=True):
                if len(column) != len(own):
                    raise ConfigError(
                        f"{self.label}: {pattern!r} matches {len(own)} modules and its related "
                        f"{other!r} matches {len(column)}: {', '.join(t.name for t in column[:6])};"
                        " they are paired in order, so write a pattern that matches one for each"
                    )
            found += [(t, [c[i] for c in columns]) for i, t in enumerate(own)]
        return found

    def kept(self, target: Target) -> torch.Tensor:
        """The mask of a target, booleans."""
        for found, step in self.steps():
            if found.module is target.module:
                with torch.no_grad():
                    mask: torch.Tensor = step.mask() != 0
                return mask
        raise KeyError(target.name)

    def bake(self, target: Target) -> None:
        """Put zeros into weight and bias, and take mask and scores away."""
        chain = compress_module(target.module, target.name)
        (step,) = (s for s in chain.steps if s.owner == self.label)
        if step.active:
            bake_step(target.module, step)
        target.module._buffers.pop(self.mask_name, None)
        target.module._non_persistent_buffers_set.discard(self.mask_name)
        target.module._parameters.pop(self.scores_name, None)

    def finish(self, units: Any) -> None:
        """Put zeros into norms first: they read the mask of the module they are related to."""
        chosen = {id(t.module) for unit in units for t in unit.targets}
        for norm in [n for n in self.norms if self._is_of(n, chosen)]:
            chain = compress_module(norm.module, norm.name)
            for step in (s for s in chain.steps if s.owner == self.label and s.active):
                bake_step(norm.module, step)
            remove_steps(norm.module, self.label)
            self.norms.remove(norm)
        super().finish(units)

    def _is_of(self, norm: Target, chosen: set[int]) -> bool:
        steps = compress_module(norm.module, norm.name).steps
        return any(
            isinstance(s, PruningStep) and s.owner == self.label and id(s.module) in chosen
            for s in steps
        )

    def describe(self) -> Iterator[str]:
        """How much is kept."""
        yield from super().describe()
        how = "largest magnitudes" if self.config.method == "l1" else "learned scores"
        yield f"{self.config.dense_ratio:.0%} kept, by {how}"


def bake_step(module: nn.Module, step: Step) -> None:
    """Multiply a module's own weight and bias by a step's mask."""
    with torch.no_grad():
        for name in ("weight", "bias"):
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.copy_(getattr(step, name)(module, parameter))


def _kaiming(shape: tuple[int, ...], key: str) -> torch.Tensor:
    """Kaiming-uniform numbers with a = sqrt 5, the same on all ranks: of the name alone."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    fan_in = math.prod(shape[1:])
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)


class Removing(Pruning):
    """Pruning of parts that can be removed from the model."""

    def remove(self, model: nn.Module, kept: Mapping[str, torch.Tensor]) -> list[str]:
        """Remove what is pruned from targets that have related modules.

        Args:
            model: what related modules are looked for in.
            kept: booleans for the parts of each target, by name.

        Returns:
            What was removed, one line for each module.

        Raises:
            ConfigError: a related module has other dimensions.
        """
        lines = []
        for target, others in self.related(model):
            if target.name not in kept:
                continue
            own = kept[target.name]
            self.cut(target, others, own)
            names = ", ".join(other.name for other in others)
            counts = f"{int(own.sum())} of {own.numel()} {self.claims} kept"
            lines.append(f"{target.name}: {counts}, and in {names}")
        return lines

    def cut(self, target: Target, others: list[Target], kept: torch.Tensor) -> None:
        """Remove the parts of one target that are not kept, from it and its related modules."""
        keep_outputs(target, kept)
        for other in others:
            (keep_outputs if isinstance(other.module, nn.BatchNorm2d) else keep_inputs)(other, kept)


class WeightPruning(Pruning):
    """Single numbers of weights."""

    takes = (nn.Linear, nn.Conv2d)
    claims = "zeros"
    mask_name, scores_name, order = "sparse_pruning_mask", "sparse_mask_scores", 20

    @classmethod
    def parts(cls, module: nn.Module, config: Any) -> tuple[int, ...]:
        weight: Any = module.weight
        return tuple(weight.shape)

    @classmethod
    def over_weight(
        cls, mask: torch.Tensor, module: nn.Module, weight: torch.Tensor
    ) -> torch.Tensor:
        return mask

    @classmethod
    def over_bias(cls, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor | None:
        return None

    @classmethod
    def magnitudes(cls, module: nn.Module, weight: torch.Tensor, config: Any) -> torch.Tensor:
        return weight


class RowPruning(Removing):
    """Outputs of linear layers."""

    takes = (nn.Linear,)
    claims = "rows"
    mask_name, scores_name, order = "row_pruning_mask", "row_mask_scores", 30

    @classmethod
    def parts(cls, module: nn.Module, config: Any) -> tuple[int, ...]:
        weight: Any = module.weight
        return (weight.shape[0], 1)

    @classmethod
    def over_weight(
        cls, mask: torch.Tensor, module: nn.Module, weight: torch.Tensor
    ) -> torch.Tensor:
        return mask

    @classmethod
    def magnitudes(cls, module: nn.Module, weight: torch.Tensor, config: Any) -> torch.Tensor:
        return weight.sum(dim=1, keepdim=True)


class HeadPruning(Removing):
    """Heads of attention: inputs of the projection behind it."""

    config_class = HeadPruningConfig
    takes = (nn.Linear,)
    claims = "heads"
    mask_name, scores_name, order = "head_pruning_mask", "head_pruning_scores", 40

    def check(self, target: Target) -> None:
        """Refuse projections whose inputs are not divided into heads."""
        weight: Any = target.module.weight
        heads = self.config.num_heads  # type: ignore[attr-defined]
        if weight.shape[1] % heads:
            raise ConfigError(
                f"{self.label}: {target.name} has {weight.shape[1]} inputs, which {heads} heads do "
                "not divide; nothing is padded"
            )

    @classmethod
    def parts(cls, module: nn.Module, config: Any) -> tuple[int, ...]:
        return (1, config.num_heads)

    @classmethod
    def over_weight(
        cls, mask: torch.Tensor, module: nn.Module, weight: torch.Tensor
    ) -> torch.Tensor:
        return mask.repeat_interleave(weight.shape[1] // mask.shape[1], dim=1)

    @classmethod
    def over_bias(cls, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor | None:
        return None

    @classmethod
    def magnitudes(cls, module: nn.Module, weight: torch.Tensor, config: Any) -> torch.Tensor:
        return weight.sum(dim=0).view(config.num_heads, -1).sum(dim=1).view(1, -1)

    def cut(self, target: Target, others: list[Target], kept: torch.Tensor) -> None:
        """Remove heads: inputs of the projection, outputs of those to queries, keys and values."""
        keep_inputs(target, kept)
        for other in others:
            keep_rows_of_heads(other, kept)


class ChannelPruning(Removing):
    """Output channels of convolutions, and of batch norms that are related to them."""

    takes = (nn.Conv2d,)
    claims = "channels"
    mask_name, scores_name, order = "channel_pruning_mask", "channel_mask_scores", 30

    @classmethod
    def parts(cls, module: nn.Module, config: Any) -> tuple[int, ...]:
        weight: Any = module.weight
        return (weight.shape[0], 1, 1, 1)

    @classmethod
    def over_weight(
        cls, mask: torch.Tensor, module: nn.Module, weight: torch.Tensor
    ) -> torch.Tensor:
        return mask.view(-1) if weight.dim() == 1 else mask

    @classmethod
    def magnitudes(cls, module: nn.Module, weight: torch.Tensor, config: Any) -> torch.Tensor:
        return weight.flatten(1).sum(dim=1).view(-1, 1, 1, 1)
