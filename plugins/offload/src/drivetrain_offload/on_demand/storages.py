"""The memory of the accelerator that keeps the states of an engine, and its way to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import Accelerator, Fragment
from drivetrain.errors import TrainingError
from drivetrain_offload.host.locked import lock

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine


@dataclass(eq=False)
class PlacedStorage:
    """One block of the accelerator's memory that keeps states.

    Args:
        storage: torch's object, which stays while the memory comes and goes.
        kinds: names of what lies in it.
        fragments: what lies in it, with the flat views of it that reading gives.
        host: the bytes [nbytes], while they are in host memory.
    """

    storage: torch.UntypedStorage
    nbytes: int
    kinds: set[str] = field(default_factory=set)
    fragments: list[tuple[Fragment, torch.Tensor]] = field(default_factory=list)
    host: torch.Tensor | None = None

    @property
    def resizable(self) -> bool:
        """Whether the memory can be given back."""
        return bool(self.storage.resizable())

    def bytes(self) -> torch.Tensor:
        """All of it on the device, uint8 [nbytes]."""
        empty = torch.empty(0, dtype=torch.uint8, device=self.storage.device)
        return empty.set_(self.storage, 0, (self.nbytes,), (1,))

    def on_host(self, view: torch.Tensor) -> torch.Tensor:
        """What ``view``, a flat view of the storage, shows, where it lies now in host memory."""
        assert self.host is not None
        start = view.storage_offset() * view.element_size()
        return self.host.narrow(0, start, view.numel() * view.element_size()).view(view.dtype)


def move_to_host(
    storages: Sequence[PlacedStorage],
    accelerator: Accelerator,
    *,
    pin_memory: bool,
    non_blocking: bool,
) -> None:
    """Copy ``storages`` to host memory and give theirs back.

    Raises:
        TrainingError: there is too little host memory. Nothing is moved then.
    """
    for done, storage in enumerate(storages):
        try:
            memory = torch.empty(storage.nbytes, dtype=torch.uint8)
            storage.host = lock(accelerator, memory) if pin_memory else memory
        except (RuntimeError, MemoryError) as error:
            for other in storages[:done]:
                other.host = None
            locked = "pinned " if pin_memory else ""
            hint = "pin_memory=False, or " if pin_memory else ""
            raise TrainingError(
                f"no {locked}host memory for {sum(s.nbytes for s in storages)} bytes of model "
                f"states ({' '.join(str(error).split())}); {hint}move fewer kinds"
            ) from error
    for storage in storages:
        assert storage.host is not None
        storage.host.copy_(storage.bytes(), non_blocking=non_blocking)
    accelerator.synchronize()
    for storage in storages:
        storage.storage.resize_(0)


def fill_again(
    storages: Sequence[PlacedStorage], accelerator: Accelerator, *, non_blocking: bool
) -> None:
    """Give ``storages`` their memory again, with the values that they had.

    Raises:
        TrainingError: the device has too little memory. All of them then stay on the host.
    """
    for done, storage in enumerate(storages):
        try:
            storage.storage.resize_(storage.nbytes)
        except RuntimeError as error:
            for other in storages[:done]:
                other.storage.resize_(0)
            raise TrainingError(
                f"{storage.storage.device} has no memory for {sum(s.nbytes for s in storages)} "
                f"bytes of model states that come back ({' '.join(str(error).split())}); free "
                "what the phase in between has left there"
            ) from error
    for storage in storages:
        assert storage.host is not None
        storage.bytes().copy_(storage.host, non_blocking=non_blocking)
    if not non_blocking:
        accelerator.synchronize()
    for storage in storages:
        storage.host = None


def find_storages(
    engine: Engine, fragments: Iterable[Fragment], kind_of: Callable[[Fragment], str]
) -> list[PlacedStorage]:
    """The memory on the device of ``engine`` that keeps ``fragments`` and the module's parameters.

    Args:
        engine: whose device and module.
        fragments: its states.
        kind_of: names the kind of a fragment.
    """
    found: dict[int, PlacedStorage] = {}
    parameter_kind = ""
    for fragment in fragments:
        kind = kind_of(fragment)
        if fragment.kind == "parameter":
            parameter_kind = kind
        view = _real_view(fragment)
        if view is not None and view.device == engine.device:
            place = _place(found, view)
            place.kinds.add(kind)
            place.fragments.append((fragment, view))
    # Parameters that are whole while their states are sharded are in no fragment.
    for view in _whole_parameters(engine):
        _place(found, view).kinds.add(parameter_kind)
    return list(found.values())


def _place(found: dict[int, PlacedStorage], view: torch.Tensor) -> PlacedStorage:
    storage = view.untyped_storage()
    return found.setdefault(storage._cdata, PlacedStorage(storage, storage.nbytes()))


def _real_view(fragment: Fragment) -> torch.Tensor | None:
    """The memory of a fragment on the device; ``None`` if it lies elsewhere or reading copies."""
    if fragment.home != "device" or not fragment.boxes:
        return None
    view, again = fragment.read(), fragment.read()
    real = view.numel() > 0 and view.data_ptr() == again.data_ptr() and view.is_contiguous()
    return view if real else None


def _whole_parameters(engine: Engine) -> Iterator[torch.Tensor]:
    for parameter in engine.module.parameters():
        values = parameter.data
        # One that is released shows a single number, in all its elements.
        whole = values.untyped_storage().nbytes() >= values.nbytes > 0
        if values.device == engine.device and whole:
            yield values
