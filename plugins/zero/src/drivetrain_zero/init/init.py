"""``zero.Init``: models that are constructed straight into shards."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from drivetrain.communication.process_group import Ranks
from drivetrain.communication.torch_communicator import TorchCommunicator
from drivetrain.contracts import ParameterTable
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError
from drivetrain.job.accelerator_choice import choose_accelerator
from drivetrain.job.job import Job, init_distributed
from drivetrain.modules.drawing import Drawing, Initialiser
from drivetrain.modules.materialize import draw
from drivetrain.plan.plan import Plan
from drivetrain_zero.init.shards import InitShards
from drivetrain_zero.init.touch import InitTouch
from drivetrain_zero.section import ZeroSection

if TYPE_CHECKING:
    from drivetrain.contracts import Axis

logger = logging.getLogger("drivetrain.zero")

ConfigSource = Mapping[str, Any] | str | os.PathLike[str]


class Init:
    """Modules constructed inside this context keep only this rank's shards of their parameters.

    As soon as a module's constructor has ended, its parameters take the first rank's values and are
    cut into equal shards over the data-parallel ranks. Initialisation that touches them later
    inside the context works on whole parameters; outside of it, use
    :func:`drivetrain.states.whole.whole`. The engine takes the shards over. Random numbers are
    drawn as without the context, so the first rank's seed decides about the values.

    All ranks must construct the same modules. With one rank nothing is cut. Parameters on the
    meta device stay there.

    Args:
        module: a module that exists, which is cut at once; parameters on the meta device are first
            made and initialised, one module at a time.
        data_parallel_group: process group to cut over; by default all data-parallel ranks.
        config_dict_or_path: the engine's config, in which values may still be ``"auto"``. It tells
            the data-parallel ranks; at a stage below 3 nothing is cut.
        config: another name of ``config_dict_or_path``.
        enabled: ``False`` makes the context do nothing.
        dtype: of floating parameters in shards; by default as they are constructed, so that master
            weights start from unrounded values.
        remote_device: ``"cpu"`` or ``"nvme"`` keep the shards on the host until there is an engine.
        mpu: object whose data-parallel group is taken.
        tensor_overrides: ``{"dtype": ..., "device": ...}``, like ``dtype`` and ``remote_device``.
        job: the caller's job, whose data-parallel ranks are taken.
        initialize: called as ``initialize(name, tensor, generator)`` to fill a whole tensor that
            was made from the meta device; by default the ``reset_parameters()`` of the submodule
            that has it. Their random numbers begin at the seed of the script for each submodule.
        mem_efficient_linear: accepted, has no effect, like ``pin_memory``, ``param_swapper``,
            ``zero_param_parallel_group`` and the two about quantised weights: the engine's config
            decides.
        sequence_data_parallel_group: older name of ``data_parallel_group``.

    Raises:
        ConfigError: arguments contradict each other, or the config cannot be run.
        ConfigError: a tensor on the meta device is given no values.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: dist.ProcessGroup | None = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: ConfigSource | None = None,
        config: ConfigSource | None = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any | None = None,
        zero_param_parallel_group: dist.ProcessGroup | None = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: dist.ProcessGroup | None = None,
        param_swapper: Any | None = None,
        tensor_overrides: Mapping[str, Any] | None = None,
        *,
        job: Job | None = None,
        initialize: Initialiser | None = None,
    ) -> None:
        _log_without_effect(
            mem_efficient_linear=not mem_efficient_linear,
            pin_memory=pin_memory,
            zero_param_parallel_group=zero_param_parallel_group is not None,
            zero_quantized_weights=zero_quantized_weights,
            zero_quantized_nontrainable_weights=zero_quantized_nontrainable_weights,
            param_swapper=param_swapper is not None,
        )
        overrides = dict(tensor_overrides or {})
        plan = _plan(config_dict_or_path, config) if enabled else None
        self._enabled = enabled and not (plan is not None and _keeps_whole(plan))
        self._wish = _Wish(
            group=_one_group(data_parallel_group, sequence_data_parallel_group, mpu),
            job=job,
            plan=plan,
            dtype=overrides.get("dtype", dtype),
            place=overrides.get("device", remote_device),
        )
        self._entered = False
        if module is not None and self._enabled:
            with self:
                shards = _active[-1].shards
                drawing, table = Drawing(torch.initial_seed(), initialize), ParameterTable()
                draw(module, drawing, table=table, device=shards.device, made=shards.cut)
                shards.cut(module)

    def __enter__(self) -> Init:
        if self._enabled:
            outer = _active[-1] if _active else None
            shards = outer.shards if outer and self._wish.is_plain else self._wish.shards()
            _active.append(_Construction(shards))
            _active[-1].touch.__enter__()  # type: ignore[no-untyped-call]
            if outer is None:
                _wrap_constructors()
            self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._entered:
            return
        self._entered = False
        construction = _active.pop()
        if not _active:
            _unwrap_constructors()
        construction.touch.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        if error is None:
            construction.finish()
        elif construction.shards not in [other.shards for other in _active]:
            construction.shards.close()


@dataclass(frozen=True)
class _Wish:
    """What the arguments of one ``Init`` say about where parameters go."""

    group: dist.ProcessGroup | None
    job: Job | None
    plan: Plan | None
    dtype: torch.dtype | None
    place: str | torch.device | None

    @property
    def is_plain(self) -> bool:
        """Whether a surrounding ``Init`` decides."""
        return all(w is None for w in (self.group, self.job, self.plan, self.dtype, self.place))

    def shards(self) -> InitShards:
        """Meet the other ranks. Collective."""
        job, close = self.job, False
        if self.group is not None:
            init_distributed()
            device = choose_accelerator(self.plan).device(Ranks.current().local_rank)
            communicator: Any = TorchCommunicator(_OneAxis(self.group), device)  # type: ignore[arg-type]
        else:
            if job is None:
                world_size = Ranks.current().world_size
                plan = self.plan or Plan.build({}, world_size=world_size, batch_required=False)
                job, close = Job.open(plan), True
            communicator, device = job.communicator, job.device
        place = "cpu" if self.place == "nvme" else self.place
        shards = InitShards(
            communicator=communicator,
            axis="data",
            device=device,
            place=torch.device(place) if place not in (None, "none") else device,
            dtype=self.dtype,
            plan=self.plan or (self.job.plan if self.job is not None else None),
            source="zero.Init" if self.plan is None else "zero.Init(config_dict_or_path=...)",
        )
        if close:
            assert job is not None
            shards.release_with(job.close)
        return shards


class _OneAxis:
    """A mesh whose every axis is one process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def size(self, _axis: Axis) -> int:
        return dist.get_world_size(self._group)

    def coordinate(self, _axis: Axis) -> int:
        return dist.get_rank(self._group)

    def group(self, _axis: Axis) -> dist.ProcessGroup | None:
        return self._group if self.size(_axis) > 1 else None


class _Construction:
    """The modules that are made inside one context."""

    def __init__(self, shards: InitShards) -> None:
        self.shards = shards
        self.touch = InitTouch()
        self._under_way: set[int] = set()
        self._made: list[weakref.ref[nn.Module]] = []

    def run(
        self, constructor: Callable[..., None], module: nn.Module, *args: Any, **kw: Any
    ) -> None:
        """Run ``constructor``; when it is the outermost of ``module``, cut the parameters."""
        if id(module) in self._under_way or isinstance(module, Engine):
            constructor(module, *args, **kw)
            return
        self._under_way.add(id(module))
        try:
            constructor(module, *args, **kw)
        finally:
            self._under_way.discard(id(module))
        self._made.append(weakref.ref(module))
        with torch._C.DisableTorchFunction():
            self.touch.settle()
            self.shards.cut(module)

    def finish(self) -> None:
        """Keep what was touched last, and cut what was added to modules after their construction.

        In the order of construction, which is the same on all ranks.
        """
        self.touch.close_all()
        for made in self._made:
            module = made()
            if module is not None:
                self.shards.cut(module)


_active: list[_Construction] = []
"""The contexts that are entered, the innermost last."""

_originals: dict[type[nn.Module], Callable[..., None]] = {}


def _wrap_constructors() -> None:
    for cls in _subclasses(nn.Module):
        _wrap(cls)

    def subclassed(cls: type[nn.Module], /, **options: Any) -> None:
        super(nn.Module, cls).__init_subclass__(**options)
        _wrap(cls)

    nn.Module.__init_subclass__ = classmethod(subclassed)  # type: ignore[assignment]


def _unwrap_constructors() -> None:
    del nn.Module.__init_subclass__
    for cls, original in _originals.items():
        cls.__init__ = original  # type: ignore[method-assign]
    _originals.clear()


def _wrap(cls: type[nn.Module]) -> None:
    original = cls.__dict__.get("__init__")
    if original is None or cls in _originals:
        return
    _originals[cls] = original

    @functools.wraps(original)
    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if _active:
            _active[-1].run(original, self, *args, **kwargs)
        else:
            original(self, *args, **kwargs)

    cls.__init__ = construct  # type: ignore[method-assign]


def _subclasses(cls: type[nn.Module]) -> Iterator[type[nn.Module]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _plan(first: ConfigSource | None, second: ConfigSource | None) -> Plan | None:
    if first is not None and second is not None:
        raise ConfigError("zero.Init: config_dict_or_path and config are both given; give one")
    source = first if first is not None else second
    if source is None:
        return None
    return Plan.build(source, world_size=Ranks.current().world_size, batch_required=False)


def _keeps_whole(plan: Plan) -> bool:
    stage = plan.section(ZeroSection).stage
    if stage == 3 or "zero_optimization.stage" in plan.autos:
        return False
    logger.debug("zero.Init does nothing: zero_optimization.stage is %d", stage)
    return True


def _one_group(
    given: dist.ProcessGroup | None, older: dist.ProcessGroup | None, mpu: Any | None
) -> dist.ProcessGroup | None:
    groups = [group for group in (given, older) if group is not None]
    for name in ("sequence_data_parallel", "data_parallel"):
        get = getattr(mpu, f"get_{name}_group", None)
        if get is not None:
            groups.append(get())
            break
    if mpu is not None and len(groups) == 0:
        raise ConfigError("zero.Init: mpu has no get_data_parallel_group()")
    if len(groups) > 1:
        raise ConfigError(
            "zero.Init: the data-parallel group is given more than once, as data_parallel_group, "
            "sequence_data_parallel_group or by mpu; give one"
        )
    return groups[0] if groups else None


def _log_without_effect(**given: bool) -> None:
    for name, is_given in given.items():
        if is_given:
            logger.debug("zero.Init: %s has no effect, the engine's config decides", name)
