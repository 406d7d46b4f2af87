"""Printing tables whole, on terminals and into pipes."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_UNLIMITED = 100_000


def show(*tables: Table) -> None:
    """Print tables, cutting nothing: terminals get long words in several lines, pipes in one.

    ``COLUMNS`` says how wide a pipe is, if it is set.
    """
    from rich.console import Console

    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console() if narrow else Console(width=_UNLIMITED)
    for table in tables:
        for column in table.columns:
            column.overflow = "fold"
        console.print(table)
