"""The engines of this process: one for each distinct setting."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass

from drivetrain.errors import BuildError, ConfigError
from drivetrain_offload.file_io.engine import Engine
from drivetrain_offload.file_io.native_engine import NativeEngine
from drivetrain_offload.file_io.python_engine import PythonEngine
from drivetrain_offload.file_io.settings import IOSettings

logger = logging.getLogger("drivetrain.offload")


@dataclass
class _Used:
    engine: Engine
    files: int = 0


class _Engines:
    """What this process has made."""

    def __init__(self) -> None:
        self.made: dict[IOSettings, _Used] = {}
        # Taken again by the thread that has it when a file ends in the middle of something.
        self.lock = threading.RLock()
        self.said: set[str] = set()

    def start_anew(self) -> None:
        """In a forked child, which has none of the threads and must leave the parent's alone."""
        self.made = {}
        self.lock = threading.RLock()  # a thread of the parent may have held it


_process = _Engines()
os.register_at_fork(after_in_child=_process.start_anew)


def acquire_engine(settings: IOSettings) -> Engine:
    """The engine of these settings, for a file; made when there is none.

    Raises:
        BuildError: there is no native library, and ``DRIVETRAIN_REQUIRE_NATIVE=1`` forbids to do
            without.
        ConfigError: the settings name an engine that cannot be had here.
    """
    with _process.lock:
        if settings not in _process.made:
            _process.made[settings] = _Used(_make(settings))
        used = _process.made[settings]
        used.files += 1
        return used.engine


def release_engine(settings: IOSettings) -> None:
    """A file that acquired an engine is closed; the engine ends with the last one."""
    with _process.lock:
        used = _process.made[settings]
        used.files -= 1
        if used.files:
            return
        del _process.made[settings]
    used.engine.close()


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
