"""Messages from rank to rank through shared memory.

A sender copies a message into memory of its own that the receiver maps, and goes on; the receiver
copies it out on the thread that waits for it. No other thread takes part, so a message is there as
soon as the waiting thread gets a core, however busy the sender's is.
"""

from __future__ import annotations

import ctypes
import threading
import zlib
from collections import defaultdict, deque
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_int, c_int64, c_uint32
from ctypes import c_void_p as pointer
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drivetrain_cpu.shared_segment import PAGE, Mapping, OwnSegment, peer_file

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import Collective
    from drivetrain_cpu.shared_group import Fault, SharedGroup

_DIED, _LEFT, OTHER_SHAPE = 1, 2, 6
"""Codes of what a rank did, beside those of the native library."""

_FILE_BITS = 32
"""A message's file is the descriptor; above these bits it tells what kind of tensor is sent."""

_WRAP = 1 << 32
"""Counters have 32 bits."""


class Message(Structure):
    """``Message`` of shared_group.h."""

    _fields_ = [("bytes", c_int64), ("capacity", c_int64), ("file", c_int64)]


@dataclass(eq=False)
class _Block:
    """Memory for one message at a time.

    Args:
        segment: the file, open for as long as the receiver may come to map it.
        mapping: of this process.
        free: how many messages the receiver has taken when this memory is free again.
    """

    segment: OwnSegment
    mapping: Mapping
    free: int = 0


class Mail:
    """What is under way from and to one rank of a group.

    Args:
        library: the native kernels.
        group: the native group.
        size: number of ranks.
        processes: their ids.
    """

    def __init__(
        self, library: ctypes.CDLL, group: int, size: int, processes: Sequence[int]
    ) -> None:
        library.dt_group_post.argtypes = [pointer, c_int, POINTER(Message)]
        library.dt_group_await.argtypes = [pointer, c_int, c_uint32, POINTER(Message)]
        library.dt_group_take.argtypes, library.dt_group_take.restype = [pointer, c_int], None
        library.dt_group_taken.argtypes = [pointer, c_int]
        library.dt_group_taken.restype = c_uint32
        self._library, self._group, self._processes = library, group, list(processes)
        self._blocks: list[list[_Block]] = [[] for _ in range(size)]
        self._sent, self._received = [0] * size, [0] * size
        self._coming: list[deque[torch.Tensor]] = [deque() for _ in range(size)]
        self._mapped: dict[tuple[int, int], Mapping] = {}
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._closed = False

    def send(self, to: int, tensor: torch.Tensor) -> int:
        """Copy ``tensor`` to where position ``to`` finds it; 0, or the code of what it did."""
        with self._sending:
            if self._closed:
                return _LEFT
            block = self._block(to, tensor.nbytes)
            ctypes.memmove(block.mapping.address, tensor.data_ptr(), tensor.nbytes)
            file = block.segment.descriptor | _kind(tensor) << _FILE_BITS
            message = Message(tensor.nbytes, block.segment.size, file)
            code: int = self._library.dt_group_post(self._group, to, byref(message))
            if code == 0:
                self._sent[to] = block.free = (self._sent[to] + 1) % _WRAP
            return code

    def expect(self, source: int, tensor: torch.Tensor) -> int:
        """Note that the next message of ``source`` goes into ``tensor``; its number."""
        with self._receiving:
            self._coming[source].append(tensor)
            return (self._received[source] + len(self._coming[source])) % _WRAP

    def receive(self, source: int, number: int) -> int:
        """Copy messages of ``source`` up to ``number``; 0, or the code of what it did."""
        with self._receiving:
            while _before(self._received[source], number):
                if self._closed:
                    return _LEFT
                message = Message()
                code: int = self._library.dt_group_await(
                    self._group, source, self._received[source], byref(message)
                )
                if code == 0:
                    code = self._copy(source, self._coming[source][0], message)
                if code != 0:
                    return code
                self._coming[source].popleft()
                self._library.dt_group_take(self._group, source)
                self._received[source] = (self._received[source] + 1) % _WRAP
        return 0

    def close(self) -> bool:
        """Let go of all memory, unless a thread waits for a message now; whether it is done."""
        locks = (self._sending, self._receiving)
        held = [lock for lock in locks if lock.acquire(blocking=False)]
        try:
            if len(held) == len(locks) and not self._closed:
                self._closed = True
                for to, blocks in enumerate(self._blocks):
                    taken = self._library.dt_group_taken(self._group, to)
                    for block in blocks:  # what has not been taken is there to the process's end
                        if not _before(taken, block.free):
                            block.segment.close_descriptor()
                self._blocks, self._mapped = [[] for _ in self._blocks], {}
            return len(held) == len(locks)
        finally:
            for lock in held:
                lock.release()

    def _block(self, to: int, size: int) -> _Block:
        """Memory for ``size`` bytes whose last message has been taken."""
        taken = self._library.dt_group_taken(self._group, to)
        for block in self._blocks[to]:
            if block.segment.size >= size and not _before(taken, block.free):
                return block
        capacity = PAGE
        while capacity < size:
            capacity *= 2  # so that messages that grow a little find it large enough
        segment = OwnSegment(capacity)
        block = _Block(segment, Mapping(segment.descriptor, segment.size))
        self._blocks[to].append(block)
        return block

    def _copy(self, source: int, tensor: torch.Tensor, message: Message) -> int:
        file = message.file & ((1 << _FILE_BITS) - 1)
        if message.bytes != tensor.nbytes or message.file >> _FILE_BITS != _kind(tensor):
            return OTHER_SHAPE
        key = source, file
        if key not in self._mapped:
            try:
                with peer_file(self._processes[source], file) as opened:
                    self._mapped[key] = Mapping(opened, message.capacity)
            except OSError:
                return _DIED
        ctypes.memmove(tensor.data_ptr(), self._mapped[key].address, tensor.nbytes)
        return 0


class Letters:
    """The messages of one send-receive.

    Args:
        group: of the axis.
        collective: the send-receive.
    """

    def __init__(self, group: SharedGroup, collective: Collective) -> None:
        self._group = group
        pairs = list(zip(collective.peers, collective.tensors, strict=True))
        self._out, incoming = pairs[: collective.sends], pairs[collective.sends :]
        self._last: dict[int, int] = defaultdict(int)
        issued = group.issued
        if issued is not None:
            for number, (tensor, peer) in enumerate(
                zip(collective.tensors, collective.peers, strict=True)
            ):
                issued.message(tensor, peer, number < collective.sends)
        self._needs = {} if issued is None else issued.note(collective)
        for source, tensor in incoming:
            self._last[source] = group.mail.expect(source, tensor)
        self.fault: Fault | None = None

    def send(self) -> None:
        """Send; :attr:`fault` tells what went wrong."""
        for to, tensor in self._out:
            if self.fault is None:
                self._note(to, self._group.mail.send(to, tensor))
        self._group.end_messages()

    def wait(self) -> Fault | None:
        """Wait for all that come; what went wrong.

        Raises:
            CommunicationError: ranks wait for each other.
        """
        self._group.begin_wait(self._needs)
        for source, number in self._last.items():
            if self.fault is None:
                self._note(source, self._group.mail.receive(source, number))
        self._group.end_wait()
        self._group.end_messages()
        return self.fault

    def _note(self, position: int, code: int) -> None:
        if code != 0:
            self.fault = self._group.fault_of(position, code)


def _kind(tensor: torch.Tensor) -> int:
    """A number that tensors of another dtype or length hardly ever have."""
    return zlib.crc32(f"{tensor.numel()} x {tensor.dtype}".encode()) & 0x7FFFFFFF


def _before(counter: int, target: int) -> bool:
    """Whether a counter that wraps has not come to ``target``."""
    return 0 < (target - counter) % _WRAP < _WRAP // 2
