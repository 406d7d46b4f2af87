"""The ranks of one axis that run on one host, meeting in shared memory."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_double, c_int, c_int32, c_int64, c_uint32
from ctypes import c_void_p as pointer
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.contracts import Collective, Communicator, Kind, Op, Purpose, Tag
from drivetrain.errors import CommunicationError
from drivetrain_cpu.shared_mail import OTHER_SHAPE, Letters, Mail
from drivetrain_cpu.shared_segment import (
    PAGE,
    Mapping,
    OwnSegment,
    Row,
    host_identity,
    peer_file,
)

if TYPE_CHECKING:
    from drivetrain.communication.overdue import Issued
    from drivetrain.contracts import Axis

SLOT_BYTES = 1 << 20
"""Size of a staging slot: two of each rank stay in the cache."""
CONTROL_BYTES = 45056
"""``kControlBytes`` of shared_group.h."""
LARGEST_GROUP = 64
"""``kMaxRanks`` of shared_group.h."""
SETUP = Tag(Purpose.CONTROL, site="set-up of shared memory")

BARRIER = 5
NUMBERS = {
    Kind.ALL_REDUCE: 0,
    Kind.REDUCE_SCATTER: 1,
    Kind.ALL_GATHER: 2,
    Kind.BROADCAST: 3,
    Kind.ALL_TO_ALL: 4,
    Kind.BARRIER: BARRIER,
}
"""The collectives that go through memory, and how ``Request`` calls them."""
REDUCED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""Dtypes that are reduced in shared memory; any dtype is moved."""
_BYTES = 3
_OPS = {Op.SUM: 0, Op.MAX: 1, Op.MIN: 2}
_FAULTS = {
    1: "died",
    2: "left the job",
    3: "is in another collective",
    4: "did not come in time",
    5: "did not come before the job was broken off",
    OTHER_SHAPE: "sent a message of another shape or dtype",
}
_APART, _TOGETHER, _CROWDED = range(3)
"""How ranks share cores: each has its own, they share enough, or too few."""
_Question = ctypes.CFUNCTYPE(c_int)


class Request(Structure):
    """``Request`` of collectives.cpp."""

    _fields_ = [
        ("collective", c_uint32),
        ("dtype", c_uint32),
        ("op", c_uint32),
        ("source", c_uint32),
        ("input", pointer),
        ("output", pointer),
        ("count", c_int64),
        ("input_segment", c_int32),
        ("output_segment", c_int32),
        ("input_offset", c_int64),
        ("output_offset", c_int64),
        ("segments", POINTER(POINTER(pointer))),
        ("sent", POINTER(c_int64)),
        ("received", POINTER(c_int64)),
        ("patient", c_uint32),
    ]


class UnavailableError(Exception):
    """Shared memory cannot serve these ranks; the message says why."""


@dataclass(frozen=True)
class Fault:
    """Why a collective failed.

    Args:
        position: of the rank at fault along the axis.
        what: what it did, e.g. ``"died"``.
    """

    position: int
    what: str


@dataclass
class _Registered:
    """A registered segment: where this rank's tensor lies, and everybody's mappings."""

    start: int
    size: int
    mappings: list[Mapping | None]
    addresses: Any


class SharedGroup:
    """Collectives of one axis; every rank makes the same calls in the same order.

    Args:
        library: the native kernels, or why there are none.
        inner: how the ranks talk until they share memory.
        axis: the axis.
        timeout: seconds after which a rank that does not come counts as lost.
        slot_bytes: size of a staging slot, the same on all ranks.
        broken_off: asked by a rank that has waited for long whether it should stop waiting.
        issued: what ranks that wait for long compare; ``None`` where they cannot.

    Raises:
        UnavailableError: on every rank, if any of them cannot share memory with all others.
    """

    def __init__(
        self,
        library: ctypes.CDLL | str,
        inner: Communicator,
        axis: Axis,
        timeout: float,
        slot_bytes: int = SLOT_BYTES,
        broken_off: Callable[[], bool] | None = None,
        issued: Issued | None = None,
    ) -> None:
        self.issued, self._waits = issued, threading.local()
        self.size, self.rank = inner.size(axis), inner.rank(axis)
        self._inner, self._axis = inner, axis
        if self.size > LARGEST_GROUP:
            raise UnavailableError(f"{self.size} ranks are more than {LARGEST_GROUP}")
        problem = library if isinstance(library, str) else ""
        self._mappings = self._share(CONTROL_BYTES + 2 * slot_bytes, problem)
        self._processes, crowd = self._watch()
        assert isinstance(library, ctypes.CDLL), "the ranks agreed, so this one has the kernels"
        assert library.dt_group_control_bytes() == CONTROL_BYTES
        self._library = library
        addresses = (pointer * self.size)(*[mapping.address for mapping in self._mappings])
        processes = (c_int * self.size)(*self._processes)
        library.dt_group_create.restype = pointer
        library.dt_group_create.argtypes = [
            c_int, c_int, POINTER(pointer), c_int64, POINTER(c_int), c_int, c_double,
        ]  # fmt: skip
        for name in ("dt_group_leave", "dt_group_destroy"):
            getattr(library, name).argtypes, getattr(library, name).restype = [pointer], None
        library.dt_group_run.argtypes = [pointer, POINTER(Request), POINTER(c_int)]
        self._run = library.dt_group_run
        self._group = library.dt_group_create(
            self.rank, self.size, addresses, slot_bytes, processes, crowd, timeout
        )
        if broken_off is not None:
            self._broken_off = broken_off
            self._question = _Question(self._stops)  # kept, since the group calls it
            library.dt_group_ask.argtypes, library.dt_group_ask.restype = [pointer, _Question], None
            library.dt_group_ask(self._group, self._question)
        self._registered: dict[int, _Registered] = {}
        self._segments = (POINTER(pointer) * 0)()
        self._made = 0
        self._fault: Fault | None = None
        self.mail = Mail(library, self._group, self.size, self._numbers)
        self._running, self._closing = threading.Lock(), False

    def serves(self, collective: Collective) -> bool:
        """Whether memory can carry one of :data:`NUMBERS`; all ranks come to the same answer.

        What does not fit together is left to the communicator inside, which refuses it.
        """
        reduces = collective.kind in (Kind.ALL_REDUCE, Kind.REDUCE_SCATTER)
        if reduces and collective.input.dtype not in REDUCED:
            return False
        local = all(tensor.device.type == "cpu" for tensor in collective.tensors)
        return local and collective.flaw(self.size, self.rank) is None

    def begin_wait(self, needs: dict[str, int]) -> None:
        """Note what this thread waits for until :meth:`end_wait`; ranks compare it after a while.

        Args:
            needs: as :meth:`Issued.note` answers.
        """
        self._waits.needs, self._waits.found = needs, None

    def end_wait(self) -> None:
        """The wait is over.

        Raises:
            CommunicationError: it was broken off, as ranks wait for each other.
        """
        self._waits.needs, found = None, self._waits.found
        if found is not None:
            raise found

    def _stops(self) -> bool:
        """Whether this thread, which has waited for long, is to stop."""
        needs = getattr(self._waits, "needs", None)
        if needs is not None and self.issued is not None:
            try:
                self.issued.compare(needs)
            except CommunicationError as error:
                self._waits.found = error
                return True
        return self._broken_off()

    def run(self, collective: Collective, *, patient: bool = False) -> Fault | None:
        """Run a collective that memory :meth:`serves`; tell how it failed, if it did.

        Args:
            collective: what to run.
            patient: nothing else is to be computed meanwhile by this rank.
        """
        if collective.kind is Kind.BARRIER:
            return self._issue(Request(collective=BARRIER, input_segment=-1, output_segment=-1))
        request = self._request(collective.input, collective.output)
        request.patient = patient
        request.collective, request.dtype = NUMBERS[collective.kind], _BYTES
        match collective.kind:
            case Kind.ALL_REDUCE | Kind.REDUCE_SCATTER:
                request.dtype, request.op = REDUCED[collective.input.dtype], _OPS[collective.op]
                request.count = collective.output.numel()
            case Kind.ALL_TO_ALL:
                request.sent = self._bytes_of_rows(collective.input, collective.input_splits)
                request.received = self._bytes_of_rows(collective.output, collective.output_splits)
            case _:
                request.count, request.source = collective.input.nbytes, collective.peer
        return self._issue(request)

    def is_registered(self, tensor: torch.Tensor) -> bool:
        """Whether every rank can read every rank's ``tensor``."""
        return self._locate(tensor)[0] >= 0

    def messages(self, collective: Collective) -> Letters:
        """Send the tensors of a send-receive; what comes is copied when the result is waited for.

        Returns:
            The messages that are to come.
        """
        letters = Letters(self, collective)
        letters.send()
        return letters

    def fault_of(self, position: int, code: int) -> Fault:
        """What a code of the native library says."""
        return Fault(position, _FAULTS[code])

    def end_messages(self) -> None:
        """Release what :meth:`close` could not, as a message was waited for."""
        if self._closing:
            self._release_unless_running()

    def read(self, gather: Collective) -> bool:
        """Do an all-gather without the other ranks, if its input is registered."""
        number, offset = self._locate(gather.input)
        if number < 0:
            return False
        addresses, output = self._registered[number].addresses, gather.output.data_ptr()
        size = gather.input.nbytes
        for position in range(self.size):
            source, target = addresses[position] + offset, output + position * size
            if source != target:
                ctypes.memmove(target, source, size)
        return True

    def _bytes_of_rows(self, tensor: torch.Tensor, splits: Sequence[int] | None) -> Any:
        """What each rank's share of the rows of ``tensor`` has; evenly without ``splits``."""
        if splits is None:
            return (c_int64 * self.size)(*[tensor.nbytes // self.size] * self.size)
        row = tensor.nbytes // max(1, tensor.shape[0])
        return (c_int64 * self.size)(*[count * row for count in splits])

    # -- registered memory -------------------------------------------------------------------------

    def buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Flat zeroed memory that all ranks map; collective.

        Raises:
            UnavailableError: on every rank, if any has not enough memory.
        """
        size = max(1, numel * dtype.itemsize)
        mappings = self._share(size)
        own = mappings[self.rank]
        number, self._made = self._made, self._made + 1
        addresses = (pointer * self.size)(*[mapping.address for mapping in mappings])
        # The tensor alone keeps this rank's mapping alive; when it goes, the segment goes.
        kept = [None if mapping is own else mapping for mapping in mappings]
        self._registered[number] = _Registered(own.address, size, kept, addresses)
        self._tabulate()
        weakref.finalize(own.block, self._forget, number).atexit = False
        return (
            torch.frombuffer(own.block, dtype=dtype, count=numel)
            if numel
            else torch.empty(0, dtype=dtype)
        )

    def joined(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of all ranks, one after another, as one flat tensor; collective.

        Args:
            numel: elements of each rank; whole pages.
            dtype: of the elements.

        Raises:
            UnavailableError: on every rank, if any has not enough memory.
        """
        size = numel * dtype.itemsize
        row = Row(self.size, size)
        self._share(size, place=row.place)
        number, self._made = self._made, self._made + 1
        places = [row.address + position * size for position in range(self.size)]
        addresses = (pointer * self.size)(*places)
        self._registered[number] = _Registered(places[self.rank], size, [], addresses)
        self._tabulate()
        weakref.finalize(row.block, self._forget, number).atexit = False
        return torch.frombuffer(row.block, dtype=dtype, count=self.size * numel)

    def _forget(self, number: int) -> None:
        del self._registered[number]
        self._tabulate()

    def _tabulate(self) -> None:
        table = (POINTER(pointer) * self._made)()
        for number, registered in self._registered.copy().items():
            table[number] = ctypes.cast(registered.addresses, POINTER(pointer))
        self._segments = table

    def _locate(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Segment and offset of a tensor in registered memory; (-1, 0) for any other."""
        start = tensor.data_ptr()
        # A copy, since another thread may let go of a buffer meanwhile; made by the one call that
        # cannot be interrupted, not even by a garbage collection that lets go of one.
        for number, registered in self._registered.copy().items():
            if registered.start <= start < registered.start + registered.size:
                return number, start - registered.start
        return -1, 0

    # -- life --------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Ranks that wait for this one fail at once. May be called repeatedly."""
        if self._group is not None:
            self._library.dt_group_leave(self._group)

    def close(self) -> None:
        """Leave, and release when no collective is under way. May be called repeatedly."""
        self.leave()
        self._closing = True
        self._release_unless_running()

    def _release_unless_running(self) -> None:
        """Release, or leave it to the thread that runs a collective now."""
        if not self._running.acquire(blocking=False):
            return
        try:
            if self._group is not None and self.mail.close():
                self._library.dt_group_destroy(self._group)
                self._group = None
                for process in self._processes:
                    if process >= 0:
                        os.close(process)
        finally:
            self._running.release()

    def _request(self, input: torch.Tensor, output: torch.Tensor) -> Request:
        request = Request(input=input.data_ptr(), output=output.data_ptr())
        request.input_segment, request.input_offset = self._locate(input)
        request.output_segment, request.output_offset = self._locate(output)
        return request

    def _issue(self, request: Request) -> Fault | None:
        try:
            with self._running:
                return self._issue_next(request)
        finally:
            if self._closing:
                self._release_unless_running()

    def _issue_next(self, request: Request) -> Fault | None:
        if self._fault is not None:
            return self._fault
        if self._closing:
            return Fault(self.rank, "has closed its shared memory")
        request.segments = self._segments
        peer = c_int(-1)
        code = self._run(self._group, byref(request), byref(peer))
        if code != 0:
            # Counters are out of step from here on: nothing may be issued any more.
            self._fault = Fault(peer.value, _FAULTS[code])
        return self._fault

    # -- set-up ------------------------------------------------------------------------------------

    def _share(
        self, size: int, problem: str = "", place: Callable[[int, int], object] | None = None
    ) -> list[Mapping]:
        """Make a segment on every rank, unless this one has a problem, and map all; collective.

        Args:
            size: bytes of each segment.
            problem: why this rank has none.
            place: maps the segment of a position from its open file; by default they are mapped
                anywhere, and the mappings are the answer.
        """
        own, offer = None, [-1] * 4
        mappings: list[Mapping] = []

        def anywhere(_position: int, descriptor: int) -> None:
            mappings.append(Mapping(descriptor, -(-size // PAGE) * PAGE))

        place = place or anywhere
        try:
            if not problem:
                own = OwnSegment(size)
                offer = [host_identity(), os.getpid(), own.descriptor, own.size]
        except OSError as error:
            problem = f"there are no {size / 2**20:.0f} MiB of shared memory ({error.strerror})"
        offers = torch.empty(4 * self.size, dtype=torch.int64)
        mine = torch.tensor(offer, dtype=torch.int64)
        self._inner.all_gather(offers, mine, self._axis, SETUP)
        table = offers.view(self.size, 4).tolist()
        mapped = False
        obstacle = _obstacle(table)
        if not obstacle:
            assert own is not None, "every rank made an offer"
            try:
                for position, (_, process, descriptor, _) in enumerate(table):
                    if position == self.rank:
                        place(position, own.descriptor)
                    else:
                        with peer_file(process, descriptor) as opened:
                            place(position, opened)
                mapped = True
            except OSError as error:
                problem = f"cannot map the memory of another rank: {error.strerror}"
        agreed = self._agree(mapped)
        if own is not None:
            own.close_descriptor()
        if not agreed:
            raise UnavailableError(problem or obstacle or "another rank cannot share memory")
        return mappings

    def _watch(self) -> tuple[list[int], int]:
        """Descriptors that tell when a rank's process ends, -1 for this one; collective.

        Also tells how they share the processors that they may run on.
        """
        found: list[int] = []
        processors: set[int] = set()
        counted = 0
        mine = torch.tensor([os.getpid()], dtype=torch.int64)
        processes = torch.empty(self.size, dtype=torch.int64)
        self._inner.all_gather(processes, mine, self._axis, SETUP)
        self._numbers: list[int] = processes.tolist()
        try:
            for position, process in enumerate(self._numbers):
                found.append(-1 if position == self.rank else os.pidfd_open(process))
                own = os.sched_getaffinity(process)
                processors |= own
                counted += len(own)
        except OSError as error:
            problem = f"cannot watch process {process}: {error.strerror}"
        else:
            problem = ""
        if not self._agree(not problem):
            raise UnavailableError(problem or "another rank cannot watch its peers")
        if len(processors) < self.size:
            return found, _CROWDED
        return found, _APART if counted == len(processors) else _TOGETHER

    def _agree(self, fine: bool) -> bool:
        """Whether all ranks are fine; nobody goes on before all have said so."""
        votes = torch.empty(self.size, dtype=torch.int64)
        mine = torch.tensor([int(fine)], dtype=torch.int64)
        self._inner.all_gather(votes, mine, self._axis, SETUP)
        return bool(votes.all())


def _obstacle(offers: Sequence[Sequence[int]]) -> str:
    """Why segments of these (host, process, descriptor, size) cannot be mapped by all ranks."""
    hosts, sizes = {offer[0] for offer in offers}, {offer[3] for offer in offers}
    if -1 in hosts:
        return "another rank cannot share memory"
    if len(hosts) > 1:
        return "its ranks are on several hosts"
    return "its ranks ask for different sizes" if len(sizes) > 1 else ""
