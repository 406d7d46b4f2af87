"""A native library with a C interface: found prebuilt or in the cache, or built; then loaded."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from drivetrain.errors import BuildError
from drivetrain_kernels.native.cache import cache_root, checked, obtain, publish
from drivetrain_kernels.native.toolchain import CXX, Recipe, Toolchain

logger = logging.getLogger("drivetrain.kernels")

KEY_LENGTH = 24
"""Hexadecimal digits of a cache key."""


class NativeLibrary:
    """Sources of one shared library, and the library once it is loaded.

    The interface is plain C (``extern "C"``, raw pointers and sizes), so one binary serves every
    torch and Python version.

    Args:
        name: unique name, part of the cache entry's name.
        sources: files to compile.
        headers: files that the sources include; they are part of the key.
        flags: compiler flags, besides those for a shared library.
        link_flags: flags for linking.
        toolchain: the compiler.
        prebuilt: folder of binaries shipped in the wheel, preferred when they match.
        before_load: called before the library is loaded, e.g. to load what it depends on.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Path],
        *,
        headers: Sequence[Path] = (),
        flags: Sequence[str] = (),
        link_flags: Sequence[str] = (),
        toolchain: Toolchain = CXX,
        prebuilt: Path | None = None,
        before_load: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.prebuilt = prebuilt
        self.origin = "not loaded yet"
        self._headers = tuple(headers)
        self._recipe = Recipe(name, toolchain, tuple(sources), tuple(flags), tuple(link_flags))
        self._before_load = before_load
        self._loaded: ctypes.CDLL | None = None
        self._failure: BuildError | None = None
        self._lock = threading.Lock()

    def load(self) -> ctypes.CDLL:
        """The loaded library; found or built at the first call.

        Raises:
            BuildError: it can be neither found nor built, or not loaded. Said again at every call
                without trying again: a broken compiler must not cost every op a build.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._loaded is None:
                try:
                    self._loaded = self._open(self._find())
                except BuildError as error:
                    self._failure = error
                    raise
            return self._loaded

    def ensure_built(self) -> Path:
        """Path of the binary, built if there is none; does not load it."""
        return self._find()

    def ship(self, folder: Path) -> Path:
        """Build and copy the binary into ``folder`` for a wheel; returns the entry made."""
        entry = folder / self._shipped_name()
        publish(self._from_cache(), entry, shipped=True)
        return entry

    def source_key(self) -> str:
        """Hash of sources, headers, flags and architecture: what a prebuilt binary must match."""
        recipe = self._recipe
        digest = hashlib.sha256()
        for part in (platform.system(), platform.machine(), recipe.toolchain.role):
            digest.update(f"{part}\0".encode())
        for words in (recipe.flags, recipe.link_flags):
            digest.update(("\0".join(words) + "\1").encode())
        for file in (*recipe.sources, *self._headers):
            content = file.read_bytes()
            digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()[:KEY_LENGTH]

    def cache_key(self) -> str:
        """:meth:`source_key` and the identity of the compiler."""
        text = f"{self.source_key()}\n{self._recipe.toolchain.identity()}"
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]

    def _find(self) -> Path:
        if self.prebuilt is not None:
            shipped = checked(self.prebuilt / self._shipped_name(), trusted=False)
            if shipped is not None:
                self.origin = f"prebuilt {self.name}"
                return shipped
        return self._from_cache()

    def _from_cache(self) -> Path:
        began = time.monotonic()
        path, built = obtain(self.name, self.cache_key(), self._recipe.build)
        self.origin = f"built {self.name}" if built else f"cached {self.name}"
        if built:
            logger.info("built %s in %.1f s", self.name, time.monotonic() - began)
        return path

    def _open(self, path: Path) -> ctypes.CDLL:
        try:
            if self._before_load is not None:
                self._before_load()
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(
                f"{self.name} was built but cannot be loaded: {error}; the cache is {cache_root()}"
            ) from error

    def _shipped_name(self) -> str:
        return f"{self.name}-{self.source_key()}"
