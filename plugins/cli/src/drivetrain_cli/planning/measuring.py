"""Takes the times that a table of a machine has."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from drivetrain.errors import DrivetrainError
from drivetrain.plan.registry import Registry
from drivetrain_cli.planning.machine_table import Curve, MachineTable
from drivetrain_cli.planning.operators import Layout, Operator

if TYPE_CHECKING:
    from drivetrain.contracts import Accelerator

_SIDES = (32, 64, 128, 256, 512, 1024, 2048)
_BYTES = tuple(1 << shift for shift in range(12, 28, 2))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_OPERATOR = 1 << 30
_SLOWEST = 20e9
"""Operations above which an operator is not run by itself: its rate is that of smaller ones."""

_FILE = 64 << 20


class Clock:
    """Times functions on one device.

    Args:
        accelerator: whose device; waited for around each measurement.
        seconds: about how long one measurement takes.
        now: the clock; on a busy machine that of the processor, for one thread on a CPU.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        seconds: float,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device = accelerator.device(0)
        self._wait = accelerator.synchronize
        self._seconds, self._now = seconds, now

    def of(self, run: Callable[[], object]) -> float:
        """Median of the seconds that a call takes."""
        run()
        self._wait()
        taken: list[float] = []
        end = self._now() + self._seconds
        while len(taken) < 3 or (self._now() < end and len(taken) < 1000):
            begin = self._now()
            run()
            self._wait()
            taken.append(self._now() - begin)
        return statistics.median(taken)


def measure_machine(accelerator: Accelerator, seconds: float) -> MachineTable:
    """Everything but collectives and disk.

    Args:
        accelerator: whose device.
        seconds: about how long each measurement takes.
    """
    clock = Clock(accelerator, seconds)
    table = MachineTable(
        {
            "device": accelerator.name,
            "processor": platform.processor() or platform.machine(),
            "threads": str(torch.get_num_threads()),
            "torch": torch.__version__,
        }
    )
    for dtype in _DTYPES:
        table.matmul[str(dtype).removeprefix("torch.")] = _products(clock, dtype)
    table.memory = [_copied(clock, nbytes) for nbytes in _BYTES]
    table.compute = [_computed(clock, nbytes) for nbytes in _BYTES]
    if clock.device.type != "cpu":
        for nbytes in _BYTES:
            here = accelerator.pin_memory(torch.empty(nbytes, dtype=torch.uint8))
            there = torch.empty(nbytes, dtype=torch.uint8, device=clock.device)
            table.to_device.append((nbytes, clock.of(partial(there.copy_, here))))
            table.to_host.append((nbytes, clock.of(partial(here.copy_, there))))
    return table


def _products(clock: Clock, dtype: torch.dtype) -> Curve:
    found: Curve = []
    for side in _SIDES:
        a = torch.randn(side, side, device=clock.device).to(dtype)
        b = torch.randn(side, side, device=clock.device).to(dtype)
        found.append((2.0 * side**3, clock.of(partial(torch.mm, a, b))))
        if found[-1][1] > 1.0:  # an emulated dtype: larger ones are slower in proportion
            break
    return found


def _copied(clock: Clock, nbytes: int) -> tuple[float, float]:
    one = torch.zeros(nbytes // 2, dtype=torch.uint8, device=clock.device)
    other = torch.empty_like(one)
    return float(nbytes), clock.of(lambda: other.copy_(one))


def _computed(clock: Clock, nbytes: int) -> tuple[float, float]:
    one = torch.randn(nbytes // 8, device=clock.device)
    return float(nbytes), clock.of(lambda: F.gelu(one))


def measure_collectives(ranks: int) -> dict[str, dict[str, Curve]]:
    """Times of collectives between so many ranks of this machine, as ``bench comm`` tells them.

    Raises:
        DrivetrainError: they cannot be measured.
    """
    if Registry.installed().find("bench", "comm") is None:
        raise DrivetrainError(
            "collectives are measured by drivetrain-communication, which is not installed: pip "
            "install drivetrain-communication, or give --ranks 1"
        )
    command = [sys.executable, "-m", "drivetrain.cli", "bench", "comm", "--json"]
    command += ["--ranks", str(ranks), "--seconds", "0.1", "--largest", "64M"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise DrivetrainError(
            f"collectives of {ranks} ranks could not be measured: {done.stderr.strip()[-500:]}"
        )
    found: dict[str, dict[str, Curve]] = {}
    for row in json.loads(lines[-1])["rows"]:
        curve = found.setdefault(row["kind"], {}).setdefault(str(ranks), [])
        curve.append((row["nbytes"], row["seconds"]))
    return found


def measure_disk(folder: Path) -> dict[str, float]:
    """Bytes a second of a file in a folder, written through to the disk and read back.

    Raises:
        DrivetrainError: no file can be made there.
    """
    block = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            begin = time.perf_counter()
            for _ in range(_FILE >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter() - begin
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            begin = time.perf_counter()
            while file.read(1 << 20):
                pass
            return {"write": _FILE / written, "read": _FILE / (time.perf_counter() - begin)}
    except OSError as error:
        raise DrivetrainError(f"{folder}: {error.strerror}; choose another --folder") from error


def time_operators(
    operators: Iterable[Operator],
    accelerator: Accelerator,
    seconds: float,
    *,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Run operators one by one on tensors of their layouts; signature -> seconds.

    Those that are too large, or whose arguments cannot be made (numbers that matter), are left
    out: their time comes from the curves.
    """
    clock = Clock(accelerator, seconds, now)
    found: dict[str, float] = {}
    for operator in operators:
        if operator.moved > _LARGEST_OPERATOR or operator.flops > _SLOWEST:
            continue
        try:
            args = _real(operator.args, clock.device)
            kwargs = {k: _real(v, clock.device) for k, v in operator.kwargs.items()}
            with torch.no_grad():
                run = partial(operator.func, *args, **kwargs)
                found[operator.signature] = clock.of(run)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            continue
    return found


def _real(value: Any, device: torch.device) -> Any:
    if isinstance(value, Layout):
        shape, stride, dtype = value
        size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if shape else 1
        if 0 in shape:
            return torch.empty(shape, dtype=dtype, device=device)
        flat = torch.zeros(size, dtype=dtype, device=device)
        if dtype.is_floating_point:
            flat.uniform_(0.5, 1.0)  # no denormal numbers, whose arithmetic is slow
        return flat.as_strided(shape, stride)
    if isinstance(value, torch.device):
        return device
    if isinstance(value, (tuple, list)):
        return [_real(each, device) for each in value]
    return value
