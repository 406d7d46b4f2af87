"""Hidden states of the calibration data between blocks, in files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch


class Activations:
    """One tensor for each batch, all in one file that is mapped into memory.

    Args:
        path: of the file; its description is beside it.
        shapes: of the batches.
        dtype: of all.
        new: make the file.
    """

    def __init__(
        self, path: Path, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, *, new: bool
    ) -> None:
        self.path, self.shapes, self.dtype = path, [tuple(s) for s in shapes], dtype
        size = sum(map(math.prod, self.shapes))
        if new:
            facts = {"shapes": self.shapes, "dtype": str(dtype).removeprefix("torch.")}
            path.with_suffix(".json").write_text(json.dumps(facts), "utf-8")
            with path.open("wb") as file:
                file.truncate(size * dtype.itemsize)
        self._flat = torch.from_file(str(path), shared=True, size=size, dtype=dtype)

    @classmethod
    def there(cls, path: Path) -> Activations:
        """Open a file that :meth:`close` has completed."""
        facts = json.loads(path.with_suffix(".json").read_text("utf-8"))
        return cls(path, facts["shapes"], getattr(torch, facts["dtype"]), new=False)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> torch.Tensor:
        start = sum(map(math.prod, self.shapes[:index]))
        shape = self.shapes[index]
        return self._flat[start : start + math.prod(shape)].view(shape)

    def __setitem__(self, index: int, values: torch.Tensor) -> None:
        self[index].copy_(values)

    def flush(self) -> None:
        """Make sure that the file is on the disk."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".json").unlink(missing_ok=True)
