"""``zero.Init`` in bytes: no rank holds more than its shards and one unit."""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from drivetrain_zero import Init
from torch import nn

import drivetrain

STAGE_3 = {
    "train_batch_size": 8,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class Stack(nn.Module):
    """Blocks of a megabyte each."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(512, 512)) for _ in range(blocks))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = torch.tanh(block(inputs))
        return (inputs - targets).square().mean()


class PeakMemory(threading.Thread):
    """Largest memory of this process alone in bytes, besides what it has at the beginning."""

    def __enter__(self) -> PeakMemory:
        # Freed memory goes back at once, so that the process's size is what is in use.
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
        libc.malloc_trim(0)  # what was let go of before would hide what comes now
        self.before, self.peak, self.ended = self.now(), 0, False
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.ended = True
        self.join()
        self.look()  # the thread may not have run for a while
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17)

    def run(self) -> None:
        while not self.ended:
            self.look()
            time.sleep(0.0005)

    def look(self) -> None:
        self.peak = max(self.peak, self.now() - self.before)

    @staticmethod
    def now() -> int:
        _size, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - shared) * resource.getpagesize()


M_MMAP_THRESHOLD = -3

SHARE_MEMORY = find_spec("drivetrain_cpu") is not None


def check_peak() -> tuple[int, int, int]:
    config = {**STAGE_3, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    with Init():
        module = Stack(2)
    drivetrain.initialize(model=module, config=config)[0].destroy()  # loads what is loaded once
    del module
    gc.collect()  # or it goes while the next ones come
    with PeakMemory() as constructing, Init():
        module = Stack(64)
    with PeakMemory() as adopting:
        engine, *_ = drivetrain.initialize(model=module, config=config)
        left = adopting.now() - adopting.before
    engine.destroy()
    return constructing.peak, adopting.peak, left


def test_no_rank_ever_holds_more_than_shards_and_a_unit() -> None:
    # Ranks that have run other tests hold memory that they use again, so these are new.
    path = [str(Path(__file__).parent), *sys.path]
    script = f"""
import json, sys; sys.path[:] = {path!r}
from test_zero_init_memory import check_peak
from drivetrain.testing import run_distributed
print(json.dumps(run_distributed(check_peak, 4)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    megabyte = 1 << 20
    for constructing, adopting, left in json.loads(done.stdout):
        # 64 MiB in all, in blocks of one; a rank keeps 16. Holding them twice would be 32.
        # Some of it may lie in memory that the rank had let go of before, and what allocator and
        # connections keep beside it differs by some MiB from kernel to kernel.
        assert 8 * megabyte < constructing < 26 * megabyte
        # 16 of gradient shards come, those of zero.Init go, or there would be 16 more; the
        # engine's 16 lie in memory that ranks share, if they do.
        own = 0 if SHARE_MEMORY else 16 * megabyte
        assert adopting < own + 13 * megabyte
        assert left < own + 12 * megabyte
