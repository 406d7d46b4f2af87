"""What the tests of files share: what serves them, bytes, and planned faults."""

from __future__ import annotations

import pytest
import torch
from drivetrain_offload.file_io import engines as engines_module
from drivetrain_offload.file_io.faults import Fault, Faults

from drivetrain.errors import BuildError

ENGINES = ("io_uring", "libaio", "threads", "python")
"""What serves a file; the last one where there is no compiler."""


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(settings: object) -> None:
        raise BuildError("no C++ compiler found")

    monkeypatch.delenv("DRIVETRAIN_REQUIRE_NATIVE", raising=False)
    monkeypatch.setattr(engines_module, "NativeEngine", refuse)
    monkeypatch.setattr(engines_module, "_process", engines_module._Engines())


def random_bytes(numel: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (numel,), dtype=torch.uint8, generator=generator)


def content(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


def plan(monkeypatch: pytest.MonkeyPatch, direction: str, number: int, code: int) -> None:
    monkeypatch.setattr(Faults, "planned", [Fault(direction == "write", number, code)])
