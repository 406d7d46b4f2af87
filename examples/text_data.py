"""Text to train on: files cut into windows, with a part held out for validation."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from drivetrain.errors import DrivetrainError

HOLD_OUT = 20
"""One of so many stretches of the text is held out."""

STRETCH = 16_384
"""Length of a stretch in bytes; shorter where there is little text."""

_SKIPPED = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


class DataError(DrivetrainError):
    """There is no text to train on."""


def standard_library() -> bytes:
    """The sources of this Python's standard library, without its tests.

    Raises:
        DataError: they are not installed.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(folder.rglob("*.py"))
        if _SKIPPED.isdisjoint(path.relative_to(folder).parts)
    ]
    texts = [text for path in files if _is_text(text := path.read_bytes())]
    if not texts:
        raise DataError(f"no Python sources in {folder}; give files of your own with --data")
    return b"\n".join(texts)


def read_files(paths: Sequence[Path]) -> bytes:
    """The text of files, and of all files in folders.

    Raises:
        DataError: a path does not exist or cannot be read, a file is not UTF-8 text, or there is
            no text at all.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"--data: {path} does not exist")
        files += [path] if path.is_file() else _files_in(path)
    if not files:
        raise DataError(f"--data: no files in {', '.join(map(str, paths))}")
    texts = []
    for path in files:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DataError(f"--data: {path} cannot be read: {error.strerror}") from error
        if not _is_text(text):
            raise DataError(f"--data: {path} is not UTF-8 text; leave it out or convert it")
        texts.append(text)
    return b"\n".join(texts)


def split(text: bytes, context: int) -> tuple[Windows, Windows]:
    """Windows to train on and windows to validate on, from different stretches of the text.

    Raises:
        DataError: the text is too short.
    """
    stretch = min(STRETCH, len(text) // HOLD_OUT)
    if stretch <= context:
        needed = HOLD_OUT * (context + 1)
        raise DataError(
            f"the text has {len(text):,} bytes, but windows of {context} bytes need {needed:,}; "
            "give more files with --data, or a smaller --context"
        )
    stretches = [text[start : start + stretch] for start in range(0, len(text), stretch)]
    held_out = b"".join(stretches[HOLD_OUT - 1 :: HOLD_OUT])
    del stretches[HOLD_OUT - 1 :: HOLD_OUT]
    return Windows(b"".join(stretches), context), Windows(held_out, context)


class Windows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A text cut into windows; each is a pair (bytes, the byte after each), [context] int64.

    Args:
        text: longer than ``context``.
        context: length of a window, in bytes.
        limit: keep at most so many windows, evenly spread over the text.
    """

    def __init__(self, text: bytes, context: int, limit: int | None = None) -> None:
        self.text = text
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._context = context
        count = (len(text) - 1) // context
        self._stride = max(1, count // limit) if limit else 1
        self._count = min(count, limit) if limit else count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = index * self._stride * self._context
        window = self._bytes[start : start + self._context + 1].long()
        return window[:-1], window[1:]

    def at_most(self, limit: int) -> Windows:
        """At most ``limit`` of these windows, evenly spread over the text."""
        return Windows(self.text, self._context, limit)


def _files_in(folder: Path) -> list[Path]:
    def visible(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        return not any(part.startswith(".") or part == "__pycache__" for part in parts)

    return [path for path in sorted(folder.rglob("*")) if path.is_file() and visible(path)]


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in content
