"""Repeated blocks of the model whose forward is run again in backward."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from drivetrain.errors import ConfigError, TrainingError
from drivetrain.states.units import Unit, units
from drivetrain_activation_checkpointing.choice import choose
from drivetrain_activation_checkpointing.measuring import Measurement
from drivetrain_activation_checkpointing.recomputation import Recomputer, Settings
from drivetrain_activation_checkpointing.saving import Saving
from drivetrain_activation_checkpointing.section import PATH

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_activation_checkpointing.section import ActivationCheckpointingSection

logger = logging.getLogger("drivetrain.activation_checkpointing")

_MEASURED = 2
"""Number of the forward that is measured; the first one warms up."""

_BOTH = (
    "the model recomputes its blocks by itself, and the config does so too: switch one of them "
    f"off (gradient checkpointing of the model, or {PATH}.recompute)"
)


def settings_of(section: ActivationCheckpointingSection) -> Settings:
    """What a section says of how functions are recomputed."""
    slots = section.number_checkpoints if section.contiguous_memory_optimization else None
    saving = Saving(section.partition_activations, section.cpu_checkpointing, slots)
    return Settings(saving, section.synchronize_checkpoint_boundary, section.profile)


def recompute_units(
    job: Job, module: nn.Module, section: ActivationCheckpointingSection
) -> nn.Module:
    """Have blocks of ``module`` recomputed in backward until the job closes.

    Raises:
        ConfigError: it has no repeated blocks, or recomputes them by itself.
    """
    found = [unit for unit in units(module) if unit.module is not module]
    if not found:
        raise ConfigError(
            f"{PATH}.recompute: {type(module).__name__} has no repeated blocks (children of one "
            "class in a ModuleList, Sequential or ModuleDict): call "
            "drivetrain_activation_checkpointing.checkpoint in its forward, with recompute: none"
        )
    if _checkpoints_itself(module):
        raise ConfigError(_BOTH)
    recomputer = Recomputer(job, settings_of(section))
    blocks = [RecomputedUnit(unit, recomputer) for unit in found]
    if isinstance(section.recompute, int):
        for number, block in enumerate(blocks):
            block.recomputes = number % section.recompute == 0
    job.on_close(ModelWithRecomputation(job, module, blocks, section.memory_limit).close)
    return module


class RecomputedUnit:
    """Stands in the place of a block's ``forward``.

    It is inside of the module's hooks, so those that gather or release parameters, or move what is
    saved, run once and find the block as it always is. A copy of the module gets the plain
    forward.

    Args:
        unit: the block.
        recomputer: of the job.
    """

    def __init__(self, unit: Unit, recomputer: Recomputer) -> None:
        self.recomputes = True
        self.measurement: tuple[Measurement, int] | None = None
        """What the next forward is measured by, and the number of this block in it."""
        self._name = unit.name
        self._module = unit.module
        self._recomputer = recomputer
        before = unit.module.__dict__.get("forward")
        if isinstance(before, RecomputedUnit):  # of a job that is still open
            before.restore()
        self._inner: Callable[..., Any] = unit.module.forward
        self._own = "forward" in unit.module.__dict__
        self.__signature__ = inspect.signature(self._inner)
        unit.module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block's forward."""
        if not self.recomputes or not torch.is_grad_enabled():
            return self._inner(*args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler knows torch's own, and nothing else
            return checkpoint(self._inner, *args, use_reentrant=False, **kwargs)
        if _inside_recomputation():
            raise TrainingError(f"{self._name}: {_BOTH}")
        self._refuse_cache(args, kwargs)
        function = self._inner
        if self.measurement is not None:
            measurement, number = self.measurement
            function = measurement.around(number, self._module, function)
        # Re-entrantly, what a block leaves elsewhere than in its result (the logits of a router,
        # which a hook collects for an extra loss) would silently have no gradient.
        return self._recomputer.run(
            function, args, kwargs, reentrant=False, key=self._name, owner=self._module
        )

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any]]:
        return _same, (self._inner,)

    def restore(self) -> None:
        """Give the block its forward back, unless another has taken the place meanwhile."""
        if self._module.__dict__.get("forward") is self:
            if self._own:
                self._module.forward = self._inner
            else:
                del self._module.forward

    def _refuse_cache(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """A cache of keys and values grows by each run of the forward, so by each repetition."""
        for value in (*args, *kwargs.values()):
            if hasattr(value, "get_seq_length") and hasattr(value, "update"):
                raise TrainingError(
                    f"{self._name} gets a cache of keys and values ({type(value).__name__}) in a "
                    "forward that trains, to which its recomputation would append once more: call "
                    f"the model with use_cache=False, or leave out {PATH}.recompute"
                )


class ModelWithRecomputation:
    """Looks after recomputed blocks from forward to forward of the model.

    Args:
        job: whose ranks choose together.
        module: the model.
        blocks: its blocks.
        limit: bytes that they may keep; ``None`` if nothing is chosen.
    """

    def __init__(
        self, job: Job, module: nn.Module, blocks: Sequence[RecomputedUnit], limit: int | None
    ) -> None:
        self._job = job
        self._module = module
        self._blocks = blocks
        self._limit = limit
        self._forwards = 0
        self._measurement: Measurement | None = None
        self._cached: list[Any] = []
        self._hooks = [
            module.register_forward_pre_hook(_Hook(self._begin)),
            module.register_forward_hook(_Hook(self._end), always_call=True),
        ]

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        for block in self._blocks:
            block.restore()

    def _begin(self, module: nn.Module, _inputs: object) -> None:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if _checkpoints_itself(module):
            raise TrainingError(_BOTH)
        for config in _configs(module):  # as Transformers does for its own checkpointing
            config.use_cache = False
            self._cached.append(config)
        self._forwards += 1
        if self._limit is not None and self._forwards == _MEASURED:
            self._measurement = Measurement(self._job, len(self._blocks))
            for number, block in enumerate(self._blocks):
                block.measurement = (self._measurement, number)

    def _end(self, _module: nn.Module, _inputs: object, outputs: object) -> None:
        while self._cached:
            self._cached.pop().use_cache = True
        measurement, self._measurement = self._measurement, None
        if measurement is not None:
            for block in self._blocks:
                block.measurement = None
            if outputs is not None:  # a forward that has failed returns none
                self._choose(measurement)

    def _choose(self, measurement: Measurement) -> None:
        assert self._limit is not None
        costs, inputs = measurement.agreed()
        again = choose(costs, self._limit - inputs)
        for number, block in enumerate(self._blocks):
            block.recomputes = number in again
        kept = inputs + sum(cost.nbytes for i, cost in enumerate(costs) if i not in again)
        most = kept + max((costs[i].nbytes for i in again), default=0)
        if self._job.rank == 0:
            share = sum(costs[i].time for i in again) / max(1, sum(cost.time for cost in costs))
            logger.info(
                "activation_checkpointing: recomputes %d of %d blocks, %.0f %% of their forward; "
                "they keep %d bytes",
                len(again),
                len(costs),
                100 * share,
                kept,
            )
            if most > self._limit:
                logger.warning(
                    "activation_checkpointing: memory_limit is %d bytes, but with all blocks "
                    "recomputed they need %d",
                    self._limit,
                    most,
                )


class _Hook:
    """A hook on a module, of which copies of the module have one that does nothing."""

    def __init__(self, run: Callable[..., None]) -> None:
        self._run = run

    def __call__(self, *arguments: Any) -> None:
        self._run(*arguments)

    def __reduce__(self) -> tuple[type[_Hook], tuple[Callable[..., None]]]:
        return _Hook, (_nothing,)


def _nothing(*_arguments: object) -> None:
    pass


def _checkpoints_itself(module: nn.Module) -> bool:
    """Whether a model of Transformers, or one that follows it, was told to checkpoint."""
    return any(getattr(part, "gradient_checkpointing", False) is True for part in module.modules())


def _configs(module: nn.Module) -> list[Any]:
    """Configs in the model that have forwards make caches of keys and values."""
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    return [c for c in configs.values() if getattr(c, "use_cache", False) is True]


def _inside_recomputation() -> bool:
    """Whether a checkpoint of somebody else surrounds this forward, or runs it in backward."""
    autograd: Any = torch._C._autograd  # torch does not type these functions
    top = autograd._top_saved_tensors_default_hooks(False)
    inside = top is not None and getattr(top[0], "__qualname__", "").startswith("_checkpoint_hook")
    return inside or torch._C._current_graph_task_id() != -1


def _same(forward: Any) -> Any:
    return forward
