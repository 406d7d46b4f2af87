"""Watches tensors of one device as they come and go, with where in the model they were made.

[Note: how tensors are seen] What operators return is seen where torch dispatches them, below
autograd; that their memory is gone, by a weak reference to its storage. Memory that is allocated
inside of an operator and freed before it returns is not seen. What was there before is found among
the objects of Python, and what a script computes between forward and backward among what the graph
of its loss has saved.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from drivetrain.errors import ConfigError
from drivetrain.tensor_parts import is_wrapper, tensor_parts
from drivetrain_profiler.places import ModulePlaces

BEFORE = "before"
"""Phase of memory that was there when the step began."""

PARAMETERS, GRADIENTS, GATHERED = "parameters", "gradients", "gathered parameters"

UNKNOWN = {
    BEFORE: "other, from before",
    "forward": "activations",
    "recompute": "activations",
    "backward": "passing in backward",
    "update": "passing in the update",
}
"""Phase -> kind of memory that nobody says more of."""


@dataclass
class Piece:
    """Memory of one storage.

    Args:
        nbytes: its size at the peak, and while it is watched, now.
        phase: in which it came: ``before``, ``forward``, ``backward``, ``recompute`` or ``update``.
        module: name of the module that made it; empty outside of modules.
        operator: that returned it; empty if unknown.
        shape: of the first tensor in it.
        dtype: of that tensor.
        kind: what it is for; empty as long as that is unknown.
        name: of the parameter whose numbers it holds, where that is known.
    """

    nbytes: int
    phase: str
    module: str = ""
    operator: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    kind: str = ""
    name: str = ""


class Change(NamedTuple):
    """Memory that came or went.

    Args:
        piece: number of the piece.
        nbytes: how many more bytes it has.
        phase: in which that was.
        module: in which module.
        operator: the operator that ran; empty if none did.
    """

    piece: int
    nbytes: int
    phase: str
    module: str
    operator: str


class MemoryWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the memory of everything that runs while it is entered.

    Args:
        device: whose memory.

    Attributes:
        pieces: all that were seen; a change has a number of theirs.
        changes: in order.
        places: is told of modules.
        updates: whether the update runs.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pieces: list[Piece] = []
        self.changes: list[Change] = []
        self.places = ModulePlaces()
        self.updates = False
        self._device = device
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}  # address: piece
        self._operator = ""
        self._before = False
        self._lock = threading.RLock()  # a weak reference may end on any thread

    # -- what is there -----------------------------------------------------------------------

    def look_around(self) -> None:
        """See all tensors of the process: those that were made while nobody watched."""
        self._before = not self.changes
        for found in gc.get_objects():
            if issubclass(type(found), torch.Tensor):
                self.see(found)
        self._before = False

    def look_at_graph(self, tensors: Iterable[torch.Tensor]) -> None:
        """See what autograd has saved between the end of the model's forward and ``tensors``."""
        nodes: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        seen = set()
        while nodes:
            node = nodes.pop()
            if node in seen or node.name() == _LEAF or node._sequence_nr() < self.places.number:
                continue
            seen.add(node)
            for attribute in dir(node):
                if attribute.startswith("_saved_") or attribute == "saved_tensors":
                    for tensor in _tensors(getattr(node, attribute)):
                        self.see(tensor)
            nodes += [following for following, _ in node.next_functions if following is not None]

    def know(self, tensor: torch.Tensor, kind: str, name: str = "") -> None:
        """Say what the memory of a tensor is for, where nobody has said so before."""
        for part in _parts(tensor):
            found = self._live.get(part.untyped_storage()._cdata)
            if found is not None:
                piece = self.pieces[found[0]]
                if not piece.kind:
                    piece.kind, piece.name = kind, name
                elif piece.kind == kind and piece.name != name:
                    piece.name = f"{piece.name.removesuffix(_MORE)}{_MORE}"

    def see(self, tensor: torch.Tensor) -> None:
        """Watch the memory of a tensor from now on."""
        for part in _parts(tensor):
            if part.device == self._device:
                with self._lock:
                    self._see(part)

    # -- what comes and goes -----------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._operator = str(func)
        for tensor in _tensors(result):
            self.see(tensor)
        self._operator = ""
        return result

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has another size now, as those of ZeRO's parameters do."""
        with self._lock:
            found = self._live.get(storage._cdata)
            if found is not None:
                piece = self.pieces[found[0]]
                change = storage.nbytes() - piece.nbytes
                if change:
                    if not piece.nbytes:
                        piece.kind = GATHERED
                    piece.nbytes += change
                    self._change(found[0], change)

    def _here(self) -> tuple[str, str]:
        """Module and phase."""
        module, which = self.places.here()
        return module, BEFORE if self._before else "update" if self.updates else which

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._live:
            self.resized(storage)
            return
        module, phase = self._here()
        piece = Piece(
            nbytes,
            phase,
            module,
            self._operator,
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
        )
        self.pieces.append(piece)
        number = len(self.pieces) - 1
        self._live[key] = number, weakref.ref(storage, lambda _: self._gone(key, number))
        self._change(number, nbytes)

    def _gone(self, key: int, number: int) -> None:
        with self._lock:
            if self._live.get(key, (None,))[0] == number:
                del self._live[key]
            self._change(number, -self.pieces[number].nbytes)

    def _change(self, number: int, nbytes: int) -> None:
        if nbytes:
            module, phase = self._here()
            self.changes.append(Change(number, nbytes, phase, module, self._operator))

    def forget(self) -> None:
        """Watch no storage any more; figures stay."""
        with self._lock:
            self._live.clear()


@contextmanager
def resizes_seen(watch: MemoryWatch) -> Iterator[None]:
    """Tell ``watch`` of storages that are given another size, which no operator does."""
    resize = torch.UntypedStorage.resize_

    def resize_seen(storage: torch.UntypedStorage, size: int) -> Any:
        found = resize(storage, size)
        watch.resized(storage)
        return found

    torch.UntypedStorage.resize_ = resize_seen  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


_LEAF, _MORE = "torch::autograd::AccumulateGrad", " and others"


def _tensors(found: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def _parts(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """The plain tensors in one; none where it does not show them."""
    if tensor.is_meta:
        return ()
    if not is_wrapper(tensor):
        return (tensor,)
    try:
        return tensor_parts(tensor, "").values()
    except ConfigError:  # what it holds is seen as what its own operators return
        return ()
