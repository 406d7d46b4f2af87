"""Tiles on their way between files and a few buffers, in the order in which they are updated."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from drivetrain_offload.file_io import AsyncFile, FileIOError, Request, aligned_empty
from drivetrain_offload.files.tile_layout import Tile, TileLayout
from drivetrain_offload.host.stall import stalled


class StateFile:
    """The file of one bucket.

    Args:
        file: of ``layout.file_bytes`` bytes; this object owns it. None if the job is only planned.
        layout: what lies where.
    """

    def __init__(self, file: AsyncFile | None, layout: TileLayout) -> None:
        self._file = file
        self.layout = layout
        self._following: Callable[[], StateFile | None] = lambda: None

    @property
    def file(self) -> AsyncFile:
        """The file."""
        assert self._file is not None, "a job that is only planned has no files"
        return self._file

    @property
    def following(self) -> StateFile | None:
        """The file that was updated next in the last step."""
        return self._following()

    @following.setter
    def following(self, file: StateFile) -> None:
        self._following = weakref.ref(file)

    def read_part(self, kind: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a kind."""
        values = torch.empty(stop - start, dtype=self.layout.kinds[kind])
        self._move(self.file.read, kind, start, values)
        return values

    def write_part(self, kind: str, start: int, values: torch.Tensor) -> None:
        """Replace the elements of a kind from ``start`` on."""
        values = values.to(device="cpu", dtype=self.layout.kinds[kind]).contiguous()
        self._move(self.file.write, kind, start, values)

    def _move(
        self,
        begin: Callable[[torch.Tensor, int], Request],
        kind: str,
        start: int,
        values: torch.Tensor,
    ) -> None:
        requests, at = [], 0
        for offset, numel in self.layout.places(kind, start, start + values.numel()):
            requests.append(begin(values[at : at + numel], offset))
            at += numel
        for request in requests:
            request.wait()


@dataclass(frozen=True)
class Place:
    """A tile of a file."""

    file: StateFile
    index: int

    @property
    def tile(self) -> Tile:
        """What lies there."""
        return self.file.layout.tiles[self.index]

    def next(self) -> Place | None:
        """The tile that is updated after this one, as far as is known."""
        if self.index + 1 < len(self.file.layout.tiles):
            return Place(self.file, self.index + 1)
        return None if self.file.following is None else Place(self.file.following, 0)


@dataclass
class _Held:
    """A tile in a buffer: being read, read ahead, being updated, or being written."""

    buffer: torch.Tensor
    reading: Request | None = None
    writing: Request | None = None
    is_taken: bool = False


class TilePipeline:
    """Reads tiles ahead of their update and writes them behind it; one per job and rank.

    A thread of its own waits for writes and fills the buffers that they leave with the tiles that
    come next, also those of the next step, while the job goes on with other things. A failed
    transfer is raised by the next call, and by every one after it: the states are lost.

    Args:
        buffer_count: number of buffers.
        buffer_bytes: size of each.
        read_ahead: whether tiles are read before they are asked for.
        write_behind: whether tiles are written after :meth:`give_back` has returned.
    """

    def __init__(
        self, buffer_count: int, buffer_bytes: int, *, read_ahead: bool, write_behind: bool
    ) -> None:
        self._read_ahead = read_ahead
        self._write_behind = write_behind
        self._changed = threading.Condition()
        self._free: list[torch.Tensor] = []
        self._held: dict[Place, _Held] = {}
        self._writes: deque[Place] = deque()
        self._ahead: Place | None = None  # the first tile that is not asked for yet
        self._latest: StateFile | None = None
        self._failure: FileIOError | None = None
        self._closing = False
        self.buffer_count, self.buffer_bytes = buffer_count, buffer_bytes
        self._has_buffers = False
        self._thread: threading.Thread | None = None

    @property
    def nbytes(self) -> int:
        """Host memory that all buffers take."""
        return self.buffer_count * self.buffer_bytes

    def grow(self, buffer_count: int, buffer_bytes: int) -> None:
        """Have so many buffers at least, each at least so large."""
        if buffer_bytes > self.buffer_bytes or buffer_count > self.buffer_count:
            self.settle()
            self.buffer_count = max(buffer_count, self.buffer_count)
            self.buffer_bytes = max(buffer_bytes, self.buffer_bytes)
            self._free.clear()
            self._has_buffers = False

    def _start(self) -> None:
        """Have buffers and the thread; nothing is taken before there is a tile."""
        if not self._has_buffers:
            self._has_buffers = True
            self._free.extend(
                aligned_empty(self.nbytes, torch.uint8).view(self.buffer_count, -1).unbind()
            )
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="drivetrain-tiles", daemon=True)
            self._thread.start()

    # -- tiles ----------------------------------------------------------------------------------

    def take(self, place: Place) -> torch.Tensor:
        """The bytes of a tile, the caller's until it gives them back.

        Raises:
            FileIOError: they cannot be read, or something failed before.
        """
        with self._changed:
            assert not self._closing, "the job is closed"
            self._start()
            self._learn(place)
            if place not in self._held or self._held[place].writing is not None:
                self._forget_ahead()  # another one was expected
                self._begin_read(place, self._await_buffer(place))
                self._ahead = place.next()
            held = self._held[place]
            held.is_taken = True
            self._fill_buffers()
        assert held.reading is not None
        self._end(held.reading)
        self._check()
        return held.buffer[: place.file.layout.nbytes(place.tile)]

    def blank(self, place: Place) -> torch.Tensor:
        """Like :meth:`take`, for a tile that is about to be overwritten: nothing is read.

        Raises:
            FileIOError: something failed before.
        """
        with self._changed:
            assert not self._closing, "the job is closed"
            self._start()
            self._forget_ahead()
            held = self._held[place] = _Held(self._await_buffer(place), is_taken=True)
        return held.buffer[: place.file.layout.nbytes(place.tile)]

    def give_back(self, place: Place) -> None:
        """Write a tile that was taken.

        Raises:
            FileIOError: it cannot be written, when that is not left for later.
        """
        with self._changed:
            held = self._held[place]
            memory = held.buffer[: place.file.layout.nbytes(place.tile)]
            held.writing = place.file.file.write(memory, place.tile.offset)
            held.is_taken = False
            self._writes.append(place)
            self._changed.notify_all()
        if not self._write_behind:
            self.drain()

    def drain(self) -> None:
        """Return once everything is written.

        Raises:
            FileIOError: something failed.
        """
        with self._changed:
            self._await(lambda: not self._writes)
            self._check()

    def settle(self) -> None:
        """:meth:`drain`, and forget what was read ahead: files are about to change otherwise.

        Raises:
            FileIOError: something failed.
        """
        with self._changed:
            self._await(lambda: not self._writes)
            self._forget_ahead()
            self._latest = None
            self._check()

    def close(self) -> None:
        """Wait for what is under way and end the thread; raises nothing."""
        with self._changed:
            self._closing = True
            self._await(lambda: not self._writes)
            self._forget_ahead()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._free.clear()

    # -- inside the lock ------------------------------------------------------------------------

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _learn(self, place: Place) -> None:
        """Note the order of files, to go by it in the next step."""
        if place.index == 0 and place.file is not self._latest:
            if self._latest is not None:
                self._latest.following = place.file
            self._latest = place.file

    def _await_buffer(self, place: Place) -> torch.Tensor:
        """A free buffer, when nothing is held of the tile any more."""
        self._await(lambda: bool(self._free) and place not in self._held)
        self._check()
        return self._free.pop()

    def _await(self, condition: Callable[[], bool]) -> None:
        """Wait on the rank's own thread, which holds the lock."""
        if not condition():
            with stalled():
                self._changed.wait_for(condition)

    def _begin_read(self, place: Place, buffer: torch.Tensor) -> None:
        memory = buffer[: place.file.layout.nbytes(place.tile)]
        self._held[place] = _Held(buffer, reading=place.file.file.read(memory, place.tile.offset))

    def _fill_buffers(self) -> None:
        """Read ahead into the buffers that are free; what is still being written has to wait."""
        while self._read_ahead and self._free and self._failure is None:
            place = self._ahead
            if place is None or place in self._held or self._closing:
                return
            self._begin_read(place, self._free.pop())
            self._ahead = place.next()

    def _forget_ahead(self) -> None:
        """Take back the buffers of tiles that are read but not taken."""
        self._ahead = None
        for place, held in list(self._held.items()):
            if held.is_taken or held.writing is not None:
                continue
            assert held.reading is not None
            self._end(held.reading)
            del self._held[place]
            self._free.append(held.buffer)

    def _end(self, request: Request) -> None:
        try:
            request.wait()
        except FileIOError as error:
            self._failure = self._failure or error

    # -- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._writes or self._closing)
                if not self._writes:
                    return
            self._end_oldest_write()

    def _end_oldest_write(self) -> None:
        held = self._held[self._writes[0]]
        assert held.writing is not None
        self._end(held.writing)
        with self._changed:
            del self._held[self._writes.popleft()]
            self._free.append(held.buffer)
            self._fill_buffers()
            self._changed.notify_all()
