"""The engine in C++: io_uring, kernel AIO, or threads that read and write past the page cache."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain_kernels.native import NativeLibrary

from drivetrain.errors import ConfigError
from drivetrain_offload.file_io.engine import (
    LATENCY_BUCKETS,
    Engine,
    Latencies,
    Outcome,
    Transfer,
)
from drivetrain_offload.file_io.settings import KINDS, IOSettings

if TYPE_CHECKING:
    from drivetrain_kernels import Provider

NATIVE = Path(__file__).parent / "native"
SOURCES = ("api", "engine", "uring_queue", "aio_queue", "blocking_queue")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-pthread")


class _Options(Structure):
    """``Options`` of engine.h."""

    _fields_ = [
        ("block_size", c_int64),
        ("kind", c_int32),
        ("depth", c_int32),
        ("threads", c_int32),
        ("single_submit", c_int32),
        ("overlap_events", c_int32),
    ]


class _Result(Structure):
    """``Result`` of engine.h."""

    _fields_ = [
        ("error", c_int32),
        ("refused", c_int32),
        ("offset", c_int64),
        ("bytes", c_int64),
    ]


class _Latencies(Structure):
    """``Latencies`` of engine.h."""

    _fields_ = [
        ("blocks", c_int64),
        ("total", c_int64),
        ("counts", c_int64 * LATENCY_BUCKETS),
    ]


@cache
def native_library() -> NativeLibrary:
    """The sources of the engine."""
    return NativeLibrary(
        "drivetrain_file_io",
        [NATIVE / f"{name}.cpp" for name in SOURCES],
        headers=[NATIVE / "engine.h", NATIVE / "queue.h"],
        flags=FLAGS,
        link_flags=("-pthread",),
        prebuilt=NATIVE / "prebuilt",
    )


def register(provider: Provider) -> None:
    """Let ``drivetrain build`` compile it; the engine is no kernel, and is offered for none."""
    provider.uses(native_library())


@cache
def _functions() -> ctypes.CDLL:
    library = native_library().load()
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "dt_io_engine": (c_void_p, [POINTER(_Options), c_char_p, c_int64]),
        "dt_io_close": (None, [c_void_p]),
        "dt_io_kind": (c_int, [c_void_p]),
        "dt_io_latencies": (None, [c_void_p, POINTER(_Latencies)]),
        "dt_io_file": (c_void_p, [c_int, c_int]),
        "dt_io_forget_file": (None, [c_void_p]),
        "dt_io_submit": (
            c_void_p,
            [c_void_p, c_void_p, c_int, c_void_p, c_int64, c_int64, c_int],
        ),
        "dt_io_done": (c_int, [c_void_p, c_void_p]),
        "dt_io_wait": (c_int, [c_void_p, c_void_p, c_double]),
        "dt_io_result": (None, [c_void_p, POINTER(_Result)]),
    }
    for name, (result, arguments) in signatures.items():
        function = library[name]
        function.restype, function.argtypes = result, arguments
        setattr(library, name, function)
    return library


class NativeEngine(Engine):
    """Blocks of all requests go through a few threads, each with a queue to the system.

    Args:
        settings: see :class:`IOSettings`.

    Raises:
        BuildError: the library cannot be built.
        ConfigError: the system does not offer the engine that the settings name.
    """

    def __init__(self, settings: IOSettings) -> None:
        self._library = _functions()
        options = _Options(
            settings.block_size,
            KINDS[settings.engine],
            settings.queue_depth,
            settings.intra_op_parallelism,
            settings.single_submit,
            settings.overlap_events,
        )
        why = ctypes.create_string_buffer(512)
        self._engine = self._library.dt_io_engine(byref(options), why, len(why))
        if not self._engine:
            raise ConfigError(
                f"aio.engine: {settings.engine} cannot be used here: {why.value.decode()}; "
                "use auto or threads, or fewer threads and a smaller queue_depth"
            )
        number = self._library.dt_io_kind(self._engine)
        self.name = next(name for name, kind in KINDS.items() if kind == number)

    def open(self, direct: int, buffered: int) -> Any:
        return self._library.dt_io_file(direct, buffered)

    def forget(self, file: Any) -> None:
        self._library.dt_io_forget_file(file)

    def submit(self, transfer: Transfer) -> Any:
        return self._library.dt_io_submit(
            self._engine,
            transfer.file,
            transfer.writes,
            transfer.address,
            transfer.nbytes,
            transfer.offset,
            transfer.fault,
        )

    def done(self, ticket: Any) -> bool:
        return bool(self._library.dt_io_done(self._engine, ticket))

    def wait(self, ticket: Any, seconds: float) -> bool:
        return bool(self._library.dt_io_wait(self._engine, ticket, seconds))

    def outcome(self, ticket: Any) -> Outcome:
        result = _Result()
        self._library.dt_io_result(ticket, byref(result))
        return Outcome(result.error, bool(result.refused), result.offset, result.bytes)

    def latencies(self) -> Latencies:
        found = _Latencies()
        self._library.dt_io_latencies(self._engine, byref(found))
        return Latencies(found.blocks, found.total * 1e-9, tuple(found.counts))

    def close(self) -> None:
        self._library.dt_io_close(self._engine)
