"""The engines of this process: one for each distinct setting."""

from __future__ import annotations

import logging
import os
import threading

from drivetrain.errors import BuildError, ConfigError
from drivetrain_offload.file_io.engine import Engine
from drivetrain_offload.file_io.native_engine import NativeEngine
from drivetrain_offload.file_io.python_engine import PythonEngine
from drivetrain_offload.file_io.settings import IOSettings

logger = logging.getLogger("drivetrain.offload")


class _Engines:
    """What this process has made."""

    def __init__(self) -> None:
        self.made: dict[IOSettings, Engine] = {}
        self.lock = threading.Lock()
        self.said: set[str] = set()

    def start_anew(self) -> None:
        """In a forked child, which has none of the threads and must leave the parent's alone."""
        self.made = {}
        self.lock = threading.Lock()  # a thread of the parent may have held it


_process = _Engines()
os.register_at_fork(after_in_child=_process.start_anew)


def engine_for(settings: IOSettings) -> Engine:
    """The engine of these settings, made at the first call.

    Raises:
        BuildError: there is no native library, and ``DRIVETRAIN_REQUIRE_NATIVE=1`` forbids to do
            without.
        ConfigError: the settings name an engine that cannot be had here.
    """
    with _process.lock:
        if settings not in _process.made:
            _process.made[settings] = _make(settings)
        return _process.made[settings]


def release_engine(settings: IOSettings) -> None:
    """End the threads of an engine that no open file uses."""
    with _process.lock:
        engine = _process.made.pop(settings, None)
    if engine is not None:
        engine.close()


def say_once(text: str) -> None:
    """Log a warning that holds for the whole process."""
    if text not in _process.said:
        _process.said.add(text)
        logger.warning(text)


def _make(settings: IOSettings) -> Engine:
    try:
        return NativeEngine(settings)
    except BuildError as error:
        if os.environ.get("DRIVETRAIN_REQUIRE_NATIVE") == "1":
            raise
        if settings.engine not in ("auto", "threads"):
            raise ConfigError(
                f"aio.engine: {settings.engine} needs the native library: {error}; use auto"
            ) from error
        say_once(f"files are read and written by Python's threads, which is slower: {error}")
        return PythonEngine(settings)
