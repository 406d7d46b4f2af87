"""Modifiers that work while a model trains: what they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field
from torch import nn

from drivetrain import whole
from drivetrain.contracts import NonNegativeInt, Op, Purpose, Tag
from drivetrain_compression.recipe.modifier import (
    CompressionUnit,
    Modifier,
    ModifierConfig,
    Progress,
    Target,
)
from drivetrain_compression.training.chain import Step, chain_of, compress_module, remove_steps

if TYPE_CHECKING:
    import torch

    from drivetrain.job.job import Job


class TrainingConfig(ModifierConfig):
    """What modifiers in training share."""

    schedule_offset: NonNegativeInt = Field(
        default=0, description="Optimizer steps before the method begins."
    )
    related_modules: tuple[tuple[str, ...], ...] | None = Field(
        default=None,
        description="For each pattern of modules, patterns of those that lose the same dimensions.",
    )


ConfigT = TypeVar("ConfigT", bound=TrainingConfig)


class TrainingModifier(Modifier[ConfigT]):
    """A modifier whose work is a step in the forward of each module.

    Attributes:
        job: communicates; ``None`` where there is one process without a job.
        started: whether the offset was reached.
    """

    def __init__(self, config: ConfigT, label: str) -> None:
        super().__init__(config, label)
        self.job: Job | None = None
        self.started = False
        self.targets: list[Target] = []

    @abstractmethod
    def make_step(self, target: Target) -> Step:
        """Build the step of a module, and give the module buffers or parameters that it needs."""

    def begin(self, units: Sequence[CompressionUnit]) -> None:
        """Attach a step to each module; none is active before the offset."""
        for target in (target for unit in units for target in unit.targets):
            step = self.make_step(target)
            compress_module(target.module, target.name).add(step)
            self.targets.append(target)

    def move_to(self, model: nn.Module) -> None:
        """Work on a copy of the model, whose modules have copies of the steps."""
        self.targets = [target.in_copy(model) for target in self.targets]

    def steps(self) -> Iterator[tuple[Target, Any]]:
        """Each module with this modifier's step in it."""
        for target in self.targets:
            chain = chain_of(target.module)
            for step in () if chain is None else chain.steps:
                if step.owner == self.label:
                    yield target, step

    def step(self, progress: Progress) -> None:
        """Begin when the offset is reached, and go on from then."""
        if progress.steps < self.config.schedule_offset:
            return
        if not self.started:
            self.start()
            self.started = True
        self.activate()
        self.advance(progress)

    def complete(self) -> None:
        """Be where training would have led to; may communicate."""
        self.start()
        self.started = True
        self.activate()

    def start(self) -> None:
        """Do what is done once, at the offset; may communicate."""

    def advance(self, progress: Progress) -> None:
        """Do what is done at every step from the offset on; may communicate."""

    def activate(self) -> None:
        """Let the steps take part."""
        for _, step in self.steps():
            step.active = True

    def finish(self, units: Sequence[CompressionUnit]) -> None:
        """Put what the steps do to weights into the weights, and take the steps away."""
        for target in (target for unit in units for target in unit.targets):
            self.bake(target)
            remove_steps(target.module, self.label)

    def bake(self, target: Target) -> None:
        """Put the step's work into the module's own tensors."""

    def describe(self) -> Iterator[str]:
        """When it begins."""
        yield f"from step {self.config.schedule_offset} on"

    # -- communication ------------------------------------------------------------------------

    @contextmanager
    def whole(self, modules: Iterable[nn.Module], write: bool = False) -> Iterator[None]:
        """Have parameters of modules whole; collective in a job."""
        parameters = [p for m in modules for p in m.parameters(recurse=False)]
        with whole(parameters, write_rank=0 if write else None):
            yield

    def over_ranks(self, tensor: torch.Tensor, op: Op, site: str) -> None:
        """Reduce over data shards in place, if there are any. Collective."""
        if self.job is not None and self.job.mesh.size("data") > 1:
            tag = Tag(Purpose.CONTROL, site=site)
            self.job.communicator.all_reduce(tensor, "data", tag, op=op)

    # -- checkpoints ----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint; masks and ranges are buffers of the module."""
        return {"started": self.started}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.started = bool(state["started"])
        if self.started:
            self.activate()
