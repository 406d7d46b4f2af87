"""Parameters that are shards before there is an engine: what ``zero.Init`` cuts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from drivetrain.contracts import Communicator, Purpose, Tag, is_float8
from drivetrain.errors import ConfigError
from drivetrain.tensor_parts import is_wrapper
from drivetrain_zero.gathering.handle import WholeOnDemand
from drivetrain_zero.gathering.released import mark_released_in_state_dict
from drivetrain_zero.scripts.copies import guard_copies
from drivetrain_zero.scripts.whole_use import OnOneRank
from drivetrain_zero.shards.shown import absent_like

if TYPE_CHECKING:
    from drivetrain.contracts import Axis
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan

_COMPARED = (
    "zero_optimization.stage",
    "zero_optimization.mics_shard_size",
    "zero_optimization.offload_param.device",
    "bf16.enabled",
    "fp16.enabled",
)
"""Config paths on which the configs of ``zero.Init`` and of the engine must agree."""


@dataclass(eq=False)
class InitShards:
    """The ranks that share what one ``zero.Init`` has cut, and how it is kept.

    Args:
        communicator: moves values.
        axis: over which they are cut.
        device: that parameters show, and are gathered on.
        place: device of the shards.
        dtype: of the shards of floating parameters; ``None`` keeps each parameter's own.
        plan: what the config given to ``Init`` says; ``None`` for no config.
        source: how messages call that ``Init``.
    """

    communicator: Communicator
    axis: Axis
    device: torch.device
    place: torch.device
    dtype: torch.dtype | None
    plan: Plan | None
    source: str
    _release: Callable[[], object] | None = None

    def release_with(self, release: Callable[[], object]) -> None:
        """Call ``release`` once: when no parameter is kept here any more, or :meth:`close` is."""
        finalizer = weakref.finalize(self, release)
        finalizer.atexit = False
        self._release = finalizer

    def close(self) -> None:
        """Give up the parameters that are kept here, which cannot be gathered any more."""
        if self._release is not None:
            self._release()

    def cut(self, module: nn.Module) -> None:
        """Shard every parameter of ``module`` that is not sharded yet. Collective."""
        for name, parameter in module.named_parameters():
            if _can_be_cut(parameter):
                self.cut_one(parameter, f"{type(module).__name__}.{name}")
        for part in module.modules():
            mark_released_in_state_dict(part)

    def cut_one(self, parameter: nn.Parameter, name: str) -> None:
        """Shard a parameter, which messages call ``name``. Collective.

        With one rank it stays whole, and ``drivetrain_alone`` tells that it was meant for shards.
        """
        stored = is_float8(parameter.dtype) and not parameter.requires_grad
        wanted = self.dtype if parameter.is_floating_point() and not stored else None
        parameter.data = parameter.data.to(self.device, wanted)
        if self.communicator.size(self.axis) > 1:
            handle = InitParameter(parameter, self, name)
            parameter.drivetrain_handle = handle  # type: ignore[attr-defined]
            guard_copies(parameter)
        else:
            parameter.drivetrain_alone = OnOneRank()  # type: ignore[attr-defined]


class InitParameter(WholeOnDemand):
    """The handle of one parameter that was cut; an engine takes its values and drops it.

    The parameter is flattened and cut into equal shards, the last one padded. All ranks start from
    the first one's values.

    Args:
        parameter: whole on every rank; released when this returns. Collective.
        shards: who shares it.
        name: what messages call it.
    """

    may_be_resized = True

    def __init__(self, parameter: nn.Parameter, shards: InitShards, name: str) -> None:
        super().__init__()
        self.shards = shards
        self._parameter = weakref.ref(parameter)
        self._name = name
        self._shard = torch.empty(0)
        self._kept = 0
        self._open = True
        self.close()

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self._parameter()
        assert parameter is not None, "a handle lives as long as its parameter"
        return parameter

    @property
    def name(self) -> str:
        return self._name

    @property
    def gathered(self) -> bool:
        return self._kept > 0 or self._open

    @property
    def shard(self) -> torch.Tensor:
        communicator, axis = self._ranks()
        left = self.parameter.numel() - communicator.rank(axis) * self._shard.numel()
        return self._shard[: max(left, 0)]

    @property
    def origin(self) -> str:
        """Who sharded the parameter."""
        return self.shards.source

    def gather(self, write_rank: int | None) -> None:
        with torch._C.DisableTorchFunction():  # which would take this for a touch of a script's
            super().gather(write_rank)

    def release(self, write_rank: int | None) -> None:
        with torch._C.DisableTorchFunction():
            super().release(write_rank)

    def open(self) -> None:
        """Make the parameter whole for changes of any kind, until :meth:`close`. Collective."""
        if not self.gathered:
            self._show_whole()
            self._open = True

    def close(self) -> None:
        """Keep the shard of the first rank's values. Collective."""
        if not self._open:
            return
        self._open = False
        parameter = self.parameter
        parameter.data = parameter.data.contiguous()
        tag = Tag(Purpose.STATE, self._name, "zero.Init")
        if not parameter.is_meta:
            self.shards.communicator.broadcast(parameter.data, self.shards.axis, tag)
        self._take_over()
        self._show_absent()

    @property
    def aliased(self) -> bool:
        """Whether the whole values, which are open, are used by another tensor too."""
        storage = self.parameter.untyped_storage()
        return int(torch._C._storage_Use_Count(storage._cdata)) > _USES_OF_ONE

    # -- where it is kept ---------------------------------------------------------------------

    def _ranks(self) -> tuple[Communicator, Axis]:
        return self.shards.communicator, self.shards.axis

    def _fetch(self, *, writable: bool) -> None:
        if self._open:
            self.close()
        if not self._kept:
            self._show_whole()
        self._kept += 1

    def _let_go(self) -> None:
        self._kept -= 1
        if not self._kept:
            self._show_absent()

    def _take_over(self) -> None:
        communicator, axis = self._ranks()
        flat, ranks, rank = self.parameter.data.reshape(-1), *_place(communicator, axis)
        length = -(-flat.numel() // ranks)
        self._shard = torch.zeros(length, dtype=flat.dtype, device=self.shards.place)
        mine = flat[rank * length : (rank + 1) * length]
        self._shard[: mine.numel()].copy_(mine)

    def _show_whole(self) -> None:
        communicator, axis = self._ranks()
        parameter, shard = self.parameter, self._shard.to(self.shards.device)
        ranks, _ = _place(communicator, axis)
        flat = torch.empty(shard.numel() * ranks, dtype=shard.dtype, device=shard.device)
        communicator.all_gather(flat, shard, axis, Tag(Purpose.WEIGHT, self._name, "zero.Init"))
        parameter.data = flat[: parameter.numel()].view(parameter.shape)

    def _show_absent(self) -> None:
        parameter = self.parameter
        parameter.data = absent_like(parameter.data)


def keep_in_shards(job: Job, part: nn.Module) -> None:
    """Cut own parameters of ``part`` over the ranks with copies, until model states take them.

    Their shards are in host memory: when states are built, the device has what these keep, and
    what they need to take over some parameters. Collective.
    """
    host = torch.device("cpu")
    for _, parameter in part.named_parameters(recurse=False):
        if _can_be_cut(parameter):
            info = job.parameters.info(parameter)
            ranks = (job.communicator, info.reduction)
            InitShards(*ranks, job.device, host, None, job.plan, "the engine").cut_one(
                parameter, info.name
            )
    mark_released_in_state_dict(part)


def refuse_other_layout(job: Job, parameters: Iterable[nn.Parameter]) -> None:
    """Check that the parameters which ``zero.Init`` has sharded were meant for ``job``.

    Args:
        job: of the engine that takes them over.
        parameters: of its module.

    Raises:
        ConfigError: the two configs lay parameters out differently; names both.
    """
    handles = (getattr(parameter, "drivetrain_handle", None) for parameter in parameters)
    sources = {handle.shards for handle in handles if isinstance(handle, InitParameter)}
    problems = []
    for shards in sources:
        if shards.plan is None or shards.plan is job.plan:
            continue
        pairs = {
            path: (_at(shards.plan.config, path), _at(job.plan.config, path)) for path in _COMPARED
        }
        pairs["the number of data-parallel ranks"] = (
            shards.plan.layout.size("data"),
            job.plan.layout.size("data"),
        )
        problems += [
            f"{what} is {ours!r} in the engine's config, but {theirs!r} in that of "
            f"{shards.source}; give both the same"
            for what, (theirs, ours) in pairs.items()
            if "auto" not in (ours, theirs) and (ours or None) != (theirs or None)
        ]
    if problems:
        raise ConfigError(problems)


def _at(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value in ("none", -1) else value


def _place(communicator: Communicator, axis: Axis) -> tuple[int, int]:
    return communicator.size(axis), communicator.rank(axis)


def _can_be_cut(parameter: nn.Parameter) -> bool:
    if hasattr(parameter, "drivetrain_handle") or is_lazy(parameter):
        return False
    return parameter.numel() > 0 and not parameter.is_meta and not is_wrapper(parameter)


def _uses_of_one() -> int:
    alone = nn.Parameter(torch.zeros(1))
    storage = alone.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata))


_USES_OF_ONE = _uses_of_one()
"""What torch counts for a storage that one tensor uses, and the object that asks."""
