"""Watches a job that runs on tensors without memory: bytes as they come and go, and operators.

Everything runs as it would, but below Python's operators: torch's kernels for the device ``meta``
compute shapes alone. What a job reads of its numbers (is a gradient finite?) gets the answer of a
training that goes well.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from drivetrain_cli.planning.operators import Operators

RELEASED = "gathered parameters"
"""Memory that comes and goes behind tensors that stay, as that of ZeRO's units does."""

_BORN = {
    "build": "buffers",
    "forward": "activations",
    "backward": "passing in backward",
    "step": "passing in the update",
}
"""Where memory is first seen -> what it is, where nothing better is known of it."""


class Change(NamedTuple):
    """Memory that came or went.

    Args:
        piece: which; numbers are not used twice.
        nbytes: how many more (or fewer) bytes it has.
        phase: ``build``, ``forward``, ``backward`` or ``step``.
        window: 0 while the engine is built, then the number of the window.
        moment: operators that have run before it.
    """

    piece: int
    nbytes: int
    phase: str
    window: int
    moment: int


@dataclass
class _Living:
    """Memory that is there.

    Args:
        piece: see :class:`Change`.
        nbytes: of the whole of it.
        reference: to what it belongs to.
        ranks: how many share it; each has one part.
    """

    piece: int
    nbytes: int
    reference: weakref.ref[Any]
    ranks: int


class _Times(threading.local):
    """How many runs of an operator each of a thread stands for."""

    now = 1


class Walk(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes memory and operators of everything that runs while it is entered, on any thread.

    Attributes:
        changes: of memory, in order.
        operators: what ran, by window.
        outer: phase outside of autograd's backward.
        window: see :class:`Change`.
        begun: window -> operators that had run when it began last.
        kinds: piece -> (kind, place), of those that are known.
        shared: pieces that are this rank's part of what several ranks map.
        threads: piece -> number of the thread whose heap it is from, of others than this one's.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.changes: list[Change] = []
        self.operators = Operators()
        self.kinds: dict[int, tuple[str, str]] = {}
        self.outer, self.window = "build", 0
        self.begun: dict[int, int] = {}
        self.shared: set[int] = set()
        self._live: dict[int, _Living] = {}  # by storage
        self.threads: dict[int, int] = {}
        self._ranks, self._thread = 1, 0
        self._times = _Times()
        self._pieces = 0
        self._lock = threading.RLock()

    @property
    def phase(self) -> str:
        """Where the calling thread is."""
        backward = torch._C._current_graph_task_id() != -1
        return "backward" if backward and self.outer != "step" else self.outer

    def begin(self, window: int) -> None:
        """A window begins, with its forward."""
        self.outer, self.window = "forward", window
        self.begun[window] = self.operators.moment

    def moment(self) -> int:
        """How many operators have run."""
        return self.operators.moment

    def piece_of(self, storage: torch.UntypedStorage) -> int | None:
        """The number of the memory that a storage stands for now."""
        found = self._live.get(storage._cdata)
        return None if found is None else found.piece

    @contextmanager
    def shared_by(self, ranks: int) -> Iterator[None]:
        """Of memory that is first seen in the context, this rank has one of so many parts."""
        with self._lock:
            self._ranks = ranks
            try:
                yield
            finally:
                self._ranks = 1

    @contextmanager
    def on_thread(self, number: int) -> Iterator[None]:
        """Memory that is first seen in the context is from the heap of that thread."""
        with self._lock:
            self._thread = number
            try:
                yield
            finally:
                self._thread = 0

    @contextmanager
    def alike(self, times: int) -> Iterator[None]:
        """Count operators that the calling thread runs in the context so many times."""
        before, self._times.now = self._times.now, times
        try:
            yield
        finally:
            self._times.now = before

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _COPIES and args[0].is_meta and _leaves_meta(kwargs):
            # Nobody knows the values; a job that looks at some gets zeros.
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is _COPY_TO and not args[0].is_meta and args[1].is_meta:
            result = args[0]  # host memory that nobody writes to takes none
        else:
            result = func(*args, **kwargs)
        with self._lock:
            tensors = _tensors(result)
            for tensor in tensors:
                self._see(tensor)
            call = (func, args, kwargs, tensors)
            self.operators.note(*call, self.phase, self.window, self._times.now)
        return result

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has another size now."""
        with self._lock:
            found = self._live.get(storage._cdata)
            if found is None:
                return
            before, now = found.nbytes, storage.nbytes()
            if now != before:
                found.nbytes = now
                self._change(found.piece, now // found.ranks - before // found.ranks)
                if not (before and now):
                    self.kinds.setdefault(found.piece, (RELEASED, "device"))

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type not in ("meta", "cpu"):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        found = self._live.get(key)
        if found is not None:
            if found.nbytes != storage.nbytes():
                self.resized(storage)
            return
        self._pieces += 1
        piece, nbytes = self._pieces, storage.nbytes()
        reference = weakref.ref(storage, lambda _: self._gone(key))
        self._live[key] = _Living(piece, nbytes, reference, self._ranks)
        if self._ranks > 1:
            self.shared.add(piece)
        if self._thread:
            self.threads[piece] = self._thread
        if tensor.device.type == "cpu":
            self.kinds[piece] = ("on the host", "host")
        self._change(piece, nbytes // self._ranks)

    def _gone(self, key: int) -> None:
        with self._lock:
            found = self._live.pop(key)
            self._change(found.piece, -(found.nbytes // found.ranks))

    def _change(self, piece: int, nbytes: int) -> None:
        if nbytes:
            moment = self.operators.moment
            self.changes.append(Change(piece, nbytes, self.phase, self.window, moment))

    def most(self) -> int:
        """Most bytes at once, in all places."""
        return max(accumulate(change.nbytes for change in self.changes), default=0)

    def kind_of(self, change: Change, born: dict[int, str]) -> tuple[str, str]:
        """What the memory of ``change`` is and where; ``born``: piece -> phase, kept here."""
        phase = born.setdefault(change.piece, change.phase)
        return self.kinds.get(change.piece) or (_BORN[phase], "device")


@contextmanager
def walking() -> Iterator[Walk]:
    """Walk with everything that runs in the context, on threads that begin in it, too."""
    walk = Walk()
    run, resize = threading.Thread.run, torch.UntypedStorage.resize_
    use = torch.Tensor.set_

    def run_walked(thread: threading.Thread) -> None:
        with walk:
            run(thread)

    def resize_walked(storage: torch.UntypedStorage, size: int) -> Any:
        found = resize(storage, size)
        walk.resized(storage)
        return found

    def use_walked(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Torch never frees a storage that a dispatch mode was given as an argument.
        with _disable_current_modes():
            return use(tensor, *args, **kwargs)

    with _readable(), walk:
        threading.Thread.run = run_walked  # type: ignore[method-assign, assignment]
        torch.UntypedStorage.resize_ = resize_walked  # type: ignore[method-assign, assignment]
        torch.Tensor.set_ = use_walked  # type: ignore[method-assign, assignment]
        try:
            yield walk
        finally:
            threading.Thread.run = run  # type: ignore[method-assign]
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
            torch.Tensor.set_ = use  # type: ignore[method-assign]


@contextmanager
def _readable() -> Iterator[None]:
    """Let numbers without memory be read: true, one."""
    library = torch.library.Library("aten", "IMPL", "Meta")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch's own kernel, which raises, makes way
        library.impl("_local_scalar_dense", _value, allow_override=True)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def _value(tensor: torch.Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1


_COPIES: frozenset[Callable[..., Any]] = frozenset({torch.ops.aten._to_copy.default})


_COPY_TO = torch.ops.aten.copy_.default


def _leaves_meta(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def _tensors(found: Any) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, (tuple, list)):
        return [tensor for each in found for tensor in _tensors(each)]
    return []
