"""One error for all that a damaged file of a folder can cause."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from drivetrain.errors import CheckpointError

_RAISED = (
    *(ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError),
    *(ValueError, SafetensorError, re.error),
)
"""What parsers, and code that takes parsed values as they are, raise for values that are not so."""


@contextmanager
def reading(folder: Path, *files: str) -> Iterator[None]:
    """Name the folder and the files in errors of code that reads them.

    Args:
        folder: of the model.
        files: names of those files in it that the code takes values from.

    Raises:
        CheckpointError: the code has raised one, or an error of a parser.
    """
    where = f"{folder} ({' with '.join(files)})"
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except _RAISED as error:
        raise CheckpointError(
            f"{where} is damaged, and cannot be read: {type(error).__name__}: {error}; copy or "
            "write the folder again"
        ) from error
