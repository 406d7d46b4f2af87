"""How the inputs of a recomputed function wait for backward: cut, in host memory, side by side.

Torch's checkpoints save inputs as autograd saves tensors, so hooks for saved tensors around the
call see exactly them. Only tensors with a gradient are taken over. Others (masks, positions) are
mostly the same for all blocks, so that a part or copy for each would take more memory, not less.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from drivetrain.contracts import Op, Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain_activation_checkpointing.memory import Copies, Memory

if TYPE_CHECKING:
    from drivetrain.job.job import Job

_AXIS = "tp"
_TAG = Tag(Purpose.ACTIVATION, site="activation checkpointing")


@dataclass(frozen=True)
class Saving:
    """Where inputs wait.

    Args:
        partition: each tensor-parallel rank keeps a part.
        host: in host memory.
        slots: inputs of one size that lie side by side, or ``None``.
    """

    partition: bool = False
    host: bool = False
    slots: int | None = None


class InputStore:
    """Keeps inputs of one job's recomputed functions.

    Args:
        job: its tensor-parallel ranks share what is partitioned.
        saving: where inputs wait; what means nothing here (host memory of a host, parts on one
            rank) is left out.
    """

    def __init__(self, job: Job, saving: Saving) -> None:
        host = saving.host and job.accelerator.device_type != "cpu"
        self.job = job
        self.saving = replace(
            saving, host=host, partition=saving.partition and job.mesh.size(_AXIS) > 1
        )
        self.copies = Copies(job.accelerator) if host else None
        place = torch.device("cpu") if host else job.device
        self.memory = Memory(place, saving.slots, job.accelerator if host else None)
        self._replicated: dict[Hashable, bool] = {}
        self._known: dict[Hashable, tuple[StorageWeakRef, weakref.ref[_Away]]] = {}

    @property
    def active(self) -> bool:
        """Whether it does anything that autograd does not."""
        return self.saving != Saving()

    def keep(self, tensor: torch.Tensor, key: Hashable) -> _Away | _Here:
        """Save one input.

        Args:
            tensor: any input of the function.
            key: the function and which of its inputs this is, for what is found out once.
        """
        if not tensor.requires_grad or not _is_movable(tensor, self.job.device):
            return _Here(tensor)
        cut = self._cuts(tensor, key)
        if not cut and not self.saving.host and self.saving.slots is None:
            return _Here(tensor)
        same = (tensor.untyped_storage()._cdata, tensor._version, tensor.storage_offset())
        geometry = (*same, tensor.dtype, tensor.size(), tensor.stride())
        if (found := self._known.get(geometry)) is not None:
            alive, reference = found
            away = None if alive.expired() else reference()  # type: ignore[no-untyped-call]
            if away is not None:
                return away
        away = _Away(self, tensor.detach(), cut)
        alive = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        weakref.finalize(away, self._known.pop, geometry, None)
        self._known[geometry] = (alive, weakref.ref(away))
        return away

    def _cuts(self, tensor: torch.Tensor, key: Hashable) -> bool:
        """Whether the tensor is kept in parts: it must be the same on all tensor-parallel ranks.

        That is compared once for each input of each function. Functions between which a tensor is
        scattered (parts of a sequence) have inputs that differ, which stay as they are.
        """
        if not self.saving.partition or tensor.numel() % self.job.mesh.size(_AXIS):
            return False
        key = (key, tensor.numel(), tensor.dtype)
        if key not in self._replicated:
            flat = _flat(tensor.detach())
            other = self.gather(self.part(flat).clone())
            equal = torch.equal(other.view(torch.uint8), flat.view(torch.uint8))
            verdict = torch.tensor(int(equal), dtype=torch.int32, device=flat.device)
            self.job.communicator.all_reduce(verdict, _AXIS, _TAG, op=Op.MIN)
            self._replicated[key] = bool(verdict)
        return self._replicated[key]

    def part(self, flat: torch.Tensor) -> torch.Tensor:
        """This rank's part of a flat tensor, a view."""
        mesh = self.job.mesh
        return flat.chunk(mesh.size(_AXIS))[mesh.coordinate(_AXIS)]

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """The flat tensor whose parts the tensor-parallel ranks have. Collective over them."""
        whole = part.new_empty(part.numel() * self.job.mesh.size(_AXIS))
        self.job.communicator.all_gather(whole, part, _AXIS, _TAG)
        return whole


class Saver:
    """The hooks for one call of a function.

    Args:
        store: of the job.
        key: names the function.
        tensors: its tensor arguments.
    """

    def __init__(self, store: InputStore, key: Hashable, tensors: Sequence[torch.Tensor]) -> None:
        self._store = store
        self._key = key
        self._places = {id(tensor): place for place, tensor in enumerate(tensors)}
        # An attribute that scripts set on a tensor to have it left alone.
        self._exempt = {id(t) for t in tensors if getattr(t, "no_checkpointing", False)}

    def pack(self, tensor: torch.Tensor) -> _Away | _Here:
        """Called for every input that is saved."""
        if id(tensor) in self._exempt or id(tensor) not in self._places:
            return _Here(tensor)
        return self._store.keep(tensor, (self._key, self._places[id(tensor)]))

    def unpack(self, kept: _Away | _Here) -> torch.Tensor:
        """Called when backward recomputes."""
        return kept.tensor()


class _Here:
    """An input that stays where it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # A result would keep its own graph alive. A parameter may be shown elsewhere in backward.
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = tensor._version

    def tensor(self) -> torch.Tensor:
        """The input, as it was."""
        if self._tensor._version != self._version:
            raise TrainingError(
                f"an input of shape {tuple(self._tensor.shape)} of a recomputed function was "
                "changed in place after the forward: replace the in-place operation by one that "
                "makes a new tensor"
            )
        return self._tensor


class _Away:
    """A copy of an input, or of this rank's part of it. Autograd's graph owns it."""

    def __init__(self, store: InputStore, tensor: torch.Tensor, cut: bool) -> None:
        self._store = store
        self._cut = cut
        self._size, self._stride, self._dtype = tensor.size(), tensor.stride(), tensor.dtype
        flat = _flat(tensor)
        part = store.part(flat) if cut else flat
        self._nbytes = part.nbytes
        self._buffer, end = store.memory.take(part.nbytes)
        target = self._buffer.narrow(0, 0, part.nbytes).view(part.dtype)
        self._end: Any = None
        if store.copies is None:
            target.copy_(part)
        else:
            self._end = store.copies.to_host(target, part, end)

    def tensor(self) -> torch.Tensor:
        """The input, whole and on the device."""
        part = self._buffer.narrow(0, 0, self._nbytes).view(self._dtype)
        copies = self._store.copies
        if copies is not None:
            kept, part = part, torch.empty_like(part, device=self._store.job.device)
            self._end = copies.to_device(part, kept, self._end)
        elif not self._cut:
            part = part.clone()  # a graph of second order may outlive this one
        flat = self._store.gather(part) if self._cut else part
        return flat.as_strided(self._size, self._stride, flat.storage_offset())

    def __del__(self) -> None:
        if hasattr(self, "_end"):
            self._store.memory.give(self._buffer, self._end)


def _is_movable(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether the tensor is nothing but values that fill a piece of memory of the device."""
    if type(tensor) is not torch.Tensor or isinstance(tensor._base, nn.Parameter):
        return False
    plain = tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg()
    return plain and tensor.device == device and tensor.numel() > 0 and _is_dense(tensor)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether each element of memory from the tensor's first to its last is one of its own."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in the order in which they lie in memory, a view."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
