"""Write shards for tests, with the standard library's tarfile and pyarrow alone."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_tar(path: Path, numbers: Sequence[int], name: str = "{:06d}") -> Path:
    """A tar file with a sample of two files for each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            for extension, text in (
                ("json", json.dumps({"number": number})),
                ("txt", f"sample {number}" * (number % 7)),
            ):
                member = tarfile.TarInfo(f"{name.format(number)}.{extension}")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
    return path


def write_parquet(path: Path, numbers: Sequence[int], group: int) -> Path:
    """A Parquet file with row groups of so many rows."""
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {
        "number": list(numbers),
        "tokens": [[n, n + 1, n + 2] for n in numbers],
        "text": [f"sample {n}" for n in numbers],
    }
    parquet.write_table(pa.table(columns), path, row_group_size=group)
    return path
