"""What a job knows of each parameter, and how to use one whole wherever it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from drivetrain.contracts.state.fragment import Box

if TYPE_CHECKING:
    from drivetrain.contracts.world.axis import Axis


@dataclass(frozen=True)
class Placement:
    """Which part of the client's whole tensor a parameter of this rank's module is.

    Args:
        global_shape: shape of the client's tensor.
        boxes: rectangles of it, in order of their local offsets. Fused and padded tensor-parallel
            shards are not "dimension and index", so any set of rectangles is allowed.
        axis: over which the other ranks hold the other rectangles.
        joined: names and lengths of client's tensors which, one after another along dimension 0,
            make up the tensor that the boxes are of, such as those of queries, keys and values.
            Checkpoints have these; everything else sees one parameter.
    """

    global_shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    axis: str | tuple[str, ...]
    joined: tuple[tuple[str, int], ...] = ()


@dataclass
class ParameterInfo:
    """Facts about one parameter; filled in by transforms and ``describe_parameters``.

    Three facts say which ranks have it. Along :attr:`reduction`, ranks have copies, each with a
    term of the gradient. Along ``placement.axis`` they have other parts of it, and along
    :attr:`distinct` other parameters in its place. Along all other axes it is *replicated*: ranks
    have copies that compute the same gradient. All copies start from the first one's values, and
    the first one counts in norms and is saved. An axis whose ranks have equal copies, but each a
    term of the gradient, belongs to :attr:`reduction`: ``tp`` for the norms between tensor-parallel
    layers that share out the sequence.

    Args:
        name: the client's stable name, which survives wrappers and transforms.
        shape: shape of the parameter in this rank's module.
        compute_dtype: dtype of the parameter in forward and backward.
        reduce_dtype: dtype in which its gradient travels; ``None`` for the job's default.
        master_dtype: dtype of the master weight; ``None`` when the parameter is its own master.
        state_dtype: dtype of optimizer states; ``None`` for the masters'.
        gradient_dtype: dtype in which its gradients are added up; ``None`` for the job's default.
        placement: the part of the client's tensor; ``None`` when it is the whole.
        reduction: axes over which the gradient is summed. The divisor is one per job.
        distinct: axes along which ranks have other parameters, such as ``pp`` for the layers of a
            pipeline's stages and ``ep`` for experts.
        sparse: whether the gradient travels as (row indices, rows).
        aliases: other names that a tied parameter has in the client's ``state_dict``.
        extra: facts that plugins share under their own name.
    """

    name: str
    shape: tuple[int, ...]
    compute_dtype: torch.dtype
    reduction: Axis
    reduce_dtype: torch.dtype | None = None
    master_dtype: torch.dtype | None = None
    state_dtype: torch.dtype | None = None
    gradient_dtype: torch.dtype | None = None
    placement: Placement | None = None
    distinct: tuple[str, ...] = ()
    sparse: bool = False
    aliases: tuple[str, ...] = ()
    extra: dict[str, object] = field(default_factory=dict)

    @property
    def client_names(self) -> tuple[str, ...]:
        """Names in checkpoints: of the tensors that the parameter is joined of, or its own."""
        joined = () if self.placement is None else self.placement.joined
        return tuple(name for name, _ in joined) or (self.name,)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the client's tensor."""
        return self.shape if self.placement is None else self.placement.global_shape


class ParameterHandle(Protocol):
    """What states that shard a parameter attach to it, as attribute ``drivetrain_handle``.

    *Whole* is what this rank's module has of the parameter. Where that is a part of the client's
    tensor, core puts the parts together, as their :class:`Placement` says.
    """

    def gather(self, write_rank: int | None) -> None:
        """Make ``parameter.data`` the whole tensor. Collective."""

    def release(self, write_rank: int | None) -> None:
        """Return to the shard; with ``write_rank``, that rank's whole tensor wins. Collective."""


class ParameterTable:
    """The job's :class:`ParameterInfo` of every parameter, keyed by the parameter itself.

    Buffers have one, too; their key is the module that they belong to and their name in it.

    Args:
        rest: takes axes; returns the names of those that make up the world together with them.
    """

    def __init__(self, rest: Callable[[Iterable[Axis]], tuple[str, ...]] = lambda _: ()) -> None:
        self._rest = rest
        # Tensors compare elementwise, so the keys must be held by identity.
        self._infos: MutableMapping[nn.Parameter, ParameterInfo] = WeakTensorKeyDictionary()
        self._successors: MutableMapping[nn.Parameter, nn.Parameter] = WeakTensorKeyDictionary()
        self._names: MutableMapping[nn.Parameter, str] = WeakTensorKeyDictionary()
        self._buffers: WeakKeyDictionary[nn.Module, dict[str, ParameterInfo]] = WeakKeyDictionary()

    def name(self, parameter: nn.Parameter, name: str) -> None:
        """Give the client's name of a parameter whose place in this rank's module is another.

        For what is built in place of the client's module, such as the layers of one stage of a
        pipeline; before or after :meth:`register`.
        """
        self._names[parameter] = name
        if parameter in self._infos:
            self._infos[parameter].name, self._infos[parameter].aliases = name, ()

    def register(self, module: nn.Module, reduction: Axis) -> None:
        """Name every parameter that is not yet known; the first name of a tied one is its name.

        A module that ``torch.compile`` has wrapped keeps the names that it has without.
        """
        new = dict[int, ParameterInfo]()
        for path, parameter in module.named_parameters(remove_duplicate=False):
            name = path.replace("_orig_mod.", "")
            if parameter not in self._infos:
                new[id(parameter)] = self._infos[parameter] = ParameterInfo(
                    name=self._names.get(parameter, name),
                    shape=tuple(parameter.shape),
                    compute_dtype=parameter.dtype,
                    reduction=reduction,
                )
            elif id(parameter) in new and parameter not in self._names:
                new[id(parameter)].aliases += (name,)
        for _ in self.buffers(module):
            pass  # which names those that are new

    def info(self, parameter: nn.Parameter) -> ParameterInfo:
        """The facts about ``parameter``.

        Raises:
            KeyError: the parameter is not part of the job.
        """
        return self._infos[parameter]

    def buffer(self, module: nn.Module, name: str) -> ParameterInfo:
        """The facts about a buffer of ``module`` itself, from :meth:`register` on.

        ``reduction`` has axes along which ranks have copies that may come to differ, such as batch
        statistics: ``data``, unless a plugin says otherwise.

        Raises:
            KeyError: there is no such buffer.
        """
        return self._buffers[module][name]

    def buffers(self, root: nn.Module) -> Iterator[tuple[str, torch.Tensor, ParameterInfo]]:
        """Path in ``root``, tensor and facts of each buffer once."""
        seen: set[int] = set()
        for path, part in root.named_modules():
            known = self._buffers.setdefault(part, {})
            for name, buffer in part._buffers.items():
                if buffer is not None and id(buffer) not in seen:
                    seen.add(id(buffer))
                    full = f"{path}.{name}" if path else name
                    found = full.replace("_orig_mod.", "")
                    facts = found, tuple(buffer.shape), buffer.dtype, "data"
                    yield full, buffer, known.setdefault(name, ParameterInfo(*facts))

    def replicated(self, info: ParameterInfo) -> tuple[str, ...]:
        """The axes along which ranks have copies that compute the same gradient.

        Raises:
            ConfigError: axes of ``info`` have ranks in common.
        """
        placed = () if info.placement is None else (info.placement.axis,)
        return self._rest((info.reduction, *info.distinct, *placed))

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Hand ``old``'s name and facts to ``new``, which takes its place in the module."""
        info = self._infos.pop(old)
        info.shape = tuple(new.shape)
        if new.dtype != old.dtype:
            info.compute_dtype = new.dtype
        self._infos[new] = info
        self._successors[old] = new

    @contextmanager
    def let_go(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Keep no reference to ``parameters`` meanwhile; torch swaps none that has a weak one."""
        tables: tuple[MutableMapping[nn.Parameter, Any], ...] = (self._infos, self._names)
        kept = [(table, p, table.pop(p)) for table in tables for p in parameters if p in table]
        try:
            yield
        finally:
            for table, parameter, value in kept:
                table[parameter] = value

    def latest(self, parameter: nn.Parameter) -> nn.Parameter:
        """What has taken the place of ``parameter``, or itself; optimizers may hold old ones."""
        while parameter in self._successors:
            parameter = self._successors[parameter]
        return parameter

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return parameter in self._infos
