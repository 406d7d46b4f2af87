"""A table of what a machine does in which time, as a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from drivetrain.errors import ConfigError, DrivetrainError

FORMAT = 1

Curve = list[tuple[float, float]]
"""(size, seconds), sizes rising."""


@dataclass
class MachineTable:
    """Seconds by size; sizes are floating-point operations of products, bytes of all else.

    Args:
        machine: what was measured, in words.
        matmul: name of the dtype -> curve, of square products.
        memory: curve of a copy in the device's memory, over bytes read and written.
        compute: curve of a function that is costly by element (GELU), over bytes read and written.
        to_device: curve of copies from the host; empty where the device is the host.
        to_host: curve of copies to the host.
        collectives: kind -> number of ranks -> curve, over bytes of the whole tensor.
        disk: ``read`` and ``write`` -> bytes a second.
        overhead: seconds of Python and of torch's dispatch for one operator.
        operators: signature -> seconds, of those that were run one by one.
    """

    machine: dict[str, str]
    matmul: dict[str, Curve] = field(default_factory=dict)
    memory: Curve = field(default_factory=list)
    compute: Curve = field(default_factory=list)
    to_device: Curve = field(default_factory=list)
    to_host: Curve = field(default_factory=list)
    collectives: dict[str, dict[str, Curve]] = field(default_factory=dict)
    disk: dict[str, float] = field(default_factory=dict)
    overhead: float = 0.0
    operators: dict[str, float] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            DrivetrainError: it cannot be written.
        """
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1), "utf-8")
            aside.replace(path)
        except OSError as error:
            raise DrivetrainError(f"{path} cannot be written: {error.strerror}") from error

    @classmethod
    def read(cls, path: Path) -> MachineTable:
        """Read a file that :meth:`write` has written.

        Raises:
            ConfigError: it is none.
        """
        try:
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
            if found.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(**found)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is no table of a machine ({error}); write one there with drivetrain "
                "measure"
            ) from error


def usual_place() -> Path:
    """Where ``drivetrain measure`` writes, and ``drivetrain plan`` reads, by default."""
    root = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(root, "drivetrain", "machine.json")


def seconds_at(curve: Sequence[Sequence[float]], size: float) -> float:
    """Seconds at a size: along straight lines between logarithms; beyond the ends, in proportion.

    Below the smallest size it is that one's time, since latency is what is left.
    """
    if not curve:
        return 0.0
    first, last = curve[0], curve[-1]
    if size <= first[0]:
        return first[1]
    if size >= last[0]:
        return last[1] * size / last[0]
    for (below, fast), (above, slow) in pairwise(curve):
        if size <= above:
            share = math.log(size / below) / math.log(above / below)
            return math.exp(math.log(fast) + share * math.log(slow / fast))
    return last[1]
