"""Activations leave the device between forward and backward.

Autograd hands every tensor that it saves in the model's forward to hooks (``torch.autograd.graph.
saved_tensors_hooks``). Large ones are copied away on a side stream while forward goes on, whole
storages at a time: views of one storage are stored once, and share it again in backward.

[Note: spans] A forward is cut into *spans* (not those of the ledger): each repeated block of the
model is one, and so is what lies between two blocks. When backward first asks for a tensor of a
span, the whole span is fetched, and fetching begins for the spans of the blocks that backward comes
to next. What the last blocks and everything behind them have saved stays, since backward wants it
at once.

Where other hooks for saved tensors are active, these decide: of a checkpointed block, which is
recomputed, only the inputs are seen here. What is recomputed in backward is left alone.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from drivetrain.errors import TrainingError
from drivetrain.states.units import units
from drivetrain_offload.activations.memory import Activation, ActivationMemory, HostMemory
from drivetrain_offload.memory import note_memory
from drivetrain_offload.section import Aio

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from drivetrain.job.job import Job
    from drivetrain_offload.activations.plugin import ActivationOffloadSection

logger = logging.getLogger("drivetrain.offload")

_SMALL_PART = 4
"""A tensor stays if its storage is more than so many times as large: most of it is for others."""

_UNDER_WAY = 2
"""Storages of a model without blocks that are copied at the same time."""

_Span = WeakKeyDictionary[Activation, None]
"""What backward needs of a part of forward and has not used up, in the order of forward."""


def offload_activations(
    job: Job, module: nn.Module, section: ActivationOffloadSection
) -> nn.Module:
    """Move the activations of ``module`` off the device of ``job`` until the job closes."""
    if section.device == "cpu" and job.accelerator.device_type == "cpu":
        if job.rank == 0:
            logger.info("activation_offload: nothing to do, the device is the CPU")
        return module
    if section.device != "cpu" and job.device.type == "meta":
        job.on_close(module.register_forward_pre_hook(_no_files).remove)
        return module
    memory = _memory(job, section)
    job.on_close(ActivationOffloader(module, memory, section).close)
    note_memory(job, memory.rows)
    return module


def _no_files(_module: nn.Module, _inputs: object) -> None:
    raise TrainingError(
        "activation_offload.device: nvme cannot be rehearsed on tensors without memory, for these "
        "have nothing to write to files; plan it with device: cpu, which takes the same of the "
        "device, and on the host what would be in files"
    )


def _memory(job: Job, section: ActivationOffloadSection) -> ActivationMemory:
    if section.nvme_path is None or section.device == "cpu":
        return HostMemory(job.accelerator, job.device, pin=section.pin_memory)
    from drivetrain_offload.activations.files import FileMemory
    from drivetrain_offload.files.swap_folder import SwapFolder

    folder = SwapFolder.of(job, section.nvme_path)
    file = folder.create("activations", job.plan.section(Aio))
    return FileMemory(job.accelerator, job.device, file, pin=section.pin_memory)


class ActivationOffloader:
    """Moves what autograd saves in the forward of one module.

    Args:
        module: the model; it gets hooks.
        memory: where activations go.
        section: which ones, and when they come back.
    """

    def __init__(
        self, module: nn.Module, memory: ActivationMemory, section: ActivationOffloadSection
    ) -> None:
        self.memory = memory
        self.min_bytes = section.min_bytes
        self._prefetch = section.prefetch
        self._keep_last = section.keep_last
        self._module = module
        self._blocks = [unit.module for unit in units(module) if unit.module is not module]
        self._count = len(self._blocks)
        inside = {p for block in self._blocks for p in block.parameters()}
        self._outside = [p for p in module.parameters() if p not in inside]
        self._passes: list[tuple[ForwardPass, saved_tensors_hooks] | None] = []
        self._hooks: list[RemovableHandle] = []
        self._install()

    def _install(self) -> None:
        keep = self._hooks.append
        keep(self._module.register_forward_pre_hook(self._begin))
        keep(self._module.register_forward_hook(self._end, always_call=True))
        for block in self._blocks:
            keep(block.register_forward_pre_hook(self._enter_block))
            keep(block.register_forward_hook(self._leave_block, always_call=True))
        if not self._blocks:
            logger.warning(
                "activation_offload: the model has no repeated blocks, so that activations are "
                "fetched when backward needs them, none ahead"
            )

    def close(self) -> None:
        """Remove the hooks; what is away can still be fetched."""
        for hook in self._hooks:
            hook.remove()

    # -- forward ------------------------------------------------------------------------------

    def _begin(self, _module: nn.Module, _inputs: object) -> None:
        if self._passes or not torch.is_grad_enabled() or not _may_hook():
            self._passes.append(None)
            return
        keep_from = self._count - self._keep_last if self._blocks else None
        current = ForwardPass(self.memory, self.min_bytes, self._prefetch, keep_from)
        current.protect(self._outside)
        current.protect(self._module.buffers())
        context = saved_tensors_hooks(current.pack, current.unpack)
        context.__enter__()
        self._passes.append((current, context))

    def _end(self, _module: nn.Module, _inputs: object, _outputs: object) -> None:
        opened = self._passes.pop() if self._passes else None
        if opened is not None:
            current, context = opened
            context.__exit__()
            current.end()
            self._count = current.blocks or self._count

    def _enter_block(self, block: nn.Module, _inputs: object) -> None:
        if self._passes and self._passes[0] is not None:
            current, _ = self._passes[0]
            current.protect(block.parameters())
            current.enter_block()

    def _leave_block(self, _block: nn.Module, _inputs: object, _outputs: object) -> None:
        if self._passes and self._passes[0] is not None:
            self._passes[0][0].leave_block()


class ForwardPass:
    """What one forward has saved, and how far its backward is.

    Args:
        memory: where activations go.
        min_bytes: smaller storages stay.
        prefetch: spans fetched ahead.
        keep_from: number of blocks after which everything stays; ``None`` for a model without
            blocks, where nothing is known of the order of backward.
    """

    def __init__(
        self, memory: ActivationMemory, min_bytes: int, prefetch: int, keep_from: int | None
    ) -> None:
        self._memory = memory
        self._min_bytes = min_bytes
        self._prefetch = prefetch
        self._keep_from = keep_from
        self.blocks = 0
        """Blocks that forward has left."""
        self._spans: list[_Span] = [WeakKeyDictionary()]
        self._known: dict[int, tuple[StorageWeakRef, weakref.ref[Activation]]] = {}
        self._protected: set[int] = set()
        self._copying: list[tuple[int, weakref.ref[Activation]]] = []
        self._reached: int | None = None

    # -- forward ------------------------------------------------------------------------------

    def protect(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave the memory of ``tensors`` alone: it is not autograd's, and may come and go."""
        dense = (tensor for tensor in tensors if tensor.layout is torch.strided)
        self._protected.update(tensor.untyped_storage()._cdata for tensor in dense)

    def enter_block(self) -> None:
        """A block begins."""
        self._next_span()

    def leave_block(self) -> None:
        """A block has ended: what was saved before it has had its time to be copied."""
        self.blocks += 1
        self._let_go(before=len(self._spans) - 1)
        self._next_span()

    def end(self) -> None:
        """Forward is over."""
        self._let_go(before=len(self._spans))
        self._known.clear()
        self._protected.clear()

    def _next_span(self) -> None:
        if self._spans[-1]:
            self._spans.append(WeakKeyDictionary())

    def _let_go(self, before: int) -> None:
        """Free what was saved in spans ``before``."""
        while self._copying and self._copying[0][0] < before:
            activation = self._copying.pop(0)[1]()
            if activation is not None:
                activation.let_go()

    # -- hooks of autograd --------------------------------------------------------------------

    def pack(self, tensor: torch.Tensor) -> Kept | Sent:
        """Called for every tensor that autograd saves."""
        number = len(self._spans) - 1
        if self._stays(tensor):
            return Kept(tensor, number)
        activation = self._activation(tensor)
        self._spans[-1][activation] = None
        return Sent(tensor, activation, number)

    def unpack(self, packed: Kept | Sent) -> torch.Tensor:
        """Called when backward needs it."""
        if self._keep_from is not None and packed.span != self._reached:
            self._reach(packed.span)
        return packed.tensor()

    def _stays(self, tensor: torch.Tensor) -> bool:
        if self._keep_from is not None and self.blocks >= self._keep_from:
            return True
        if type(tensor) is not torch.Tensor or isinstance(tensor._base, nn.Parameter):
            return True
        if tensor.device != self._memory.device or tensor.layout is not torch.strided:
            return True
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        return (
            size < self._min_bytes
            or size > _SMALL_PART * tensor.nbytes
            or storage._cdata in self._protected
            or tensor.is_conj()
            or tensor.is_neg()
            or torch._C._current_graph_task_id() != -1  # saved by a backward inside of forward
        )

    def _activation(self, tensor: torch.Tensor) -> Activation:
        """That of the tensor's storage: a new one unless it was sent with the same values."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            alive, reference = self._known[storage._cdata]
            known = None if alive.expired() else reference()  # type: ignore[no-untyped-call]
            if known is not None and known.version == tensor._version:
                return known
        activation = self._memory.send(storage, tensor.detach())
        reference = weakref.ref(activation)
        alive = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._known[storage._cdata] = (alive, reference)
        self._copying.append((len(self._spans) - 1, reference))
        if self._keep_from is None and len(self._copying) > _UNDER_WAY:
            self._spans.append(WeakKeyDictionary())
            self._let_go(before=self._copying[-_UNDER_WAY][0])
        return activation

    def _reach(self, span: int) -> None:
        """Backward has come to ``span``."""
        left, self._reached = self._reached, span
        for number in range(span, max(span - self._prefetch, 0) - 1, -1):
            for activation in reversed(list(self._spans[number])):
                activation.fetch()
        if left is not None and left > span:
            # Only a graph that is kept for another backward still has any.
            for activation in list(self._spans[left]):
                if not any(activation in earlier for earlier in self._spans[: span + 1]):
                    activation.forget()


class Kept:
    """A saved tensor that stays where it is."""

    __slots__ = ("_tensor", "_version", "span")

    def __init__(self, tensor: torch.Tensor, span: int) -> None:
        # A result would keep its own graph alive. A parameter may be shown elsewhere in backward.
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = tensor._version
        self.span = span

    def tensor(self) -> torch.Tensor:
        """The tensor, as autograd has saved it."""
        if self._tensor._version != self._version:
            raise _changed(self._tensor)
        return self._tensor


class Sent:
    """A saved tensor that is away: where it lies in its storage."""

    __slots__ = ("_activation", "_dtype", "_offset", "_size", "_stride", "span")

    def __init__(self, tensor: torch.Tensor, activation: Activation, span: int) -> None:
        self._activation = activation
        self._dtype = tensor.dtype
        self._offset = tensor.storage_offset()
        self._size, self._stride = tensor.size(), tensor.stride()
        self.span = span

    def tensor(self) -> torch.Tensor:
        """The tensor, back on the device."""
        values = self._activation.on_device()
        found = torch.empty(0, dtype=self._dtype, device=values.device)
        offset = self._offset + values.storage_offset() // self._dtype.itemsize
        found.set_(values.untyped_storage(), offset, self._size, self._stride)
        if self._activation.changed:
            raise _changed(found)
        return found


def _changed(tensor: torch.Tensor) -> TrainingError:
    return TrainingError(
        f"a tensor of shape {tuple(tensor.shape)} that backward needs was changed in place after "
        "it was saved in forward: replace the in-place operation by one that makes a new tensor"
    )


def _may_hook() -> bool:
    """Whether what is saved now is ours: not that of other hooks, and not of a backward."""
    autograd: Any = torch._C._autograd  # torch does not type these functions
    enabled: bool = autograd._saved_tensors_hooks_is_enabled()
    others = autograd._top_saved_tensors_default_hooks(False)
    return enabled and others is None and torch._C._current_graph_task_id() == -1
