"""Find another DeepSpeed that would mix with this package, or be hidden by it."""

# ruff: noqa: PTH110, PTH118
# Importing pathlib would take longer than all of this package.

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

_ITS_OWN = ("runtime", "ops", "accelerator")
"""Folders of DeepSpeed's package; here modules of these names exist in memory alone."""


def check(folders: Sequence[str], path: Sequence[str] | None = None) -> None:
    """Make sure that no other DeepSpeed can be meant.

    Args:
        folders: where this package lies.
        path: where Python looks for packages; ``sys.path`` by default.

    Raises:
        ImportError: DeepSpeed's files lie in the same folder, so that imports would mix the two.

    Warns:
        RuntimeWarning: another ``deepspeed`` lies later on ``path``, which this one hides.
    """
    for folder in folders:
        mixed = [name for name in _ITS_OWN if _is_package(os.path.join(folder, name))]
        if mixed:
            raise ImportError(
                f"{folder} holds files of DeepSpeed ({', '.join(mixed)}) beside those of "
                "Drivetrain's drop-in: run `pip uninstall deepspeed` until none is left, then "
                "install the one that you want"
            )
    own = {os.path.realpath(folder) for folder in folders}
    for entry in sys.path if path is None else path:
        other = os.path.join(entry or ".", "deepspeed")
        if _is_package(other) and os.path.realpath(other) not in own:
            warnings.warn(
                f"there is another deepspeed in {other}, which Drivetrain's drop-in in "
                f"{folders[0]} hides: uninstall one of them",
                RuntimeWarning,
                stacklevel=3,
            )


def _is_package(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, "__init__.py"))
