"""Activations on a side stream that does nothing before somebody waits for it."""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_offload.activations.files import FileMemory
from drivetrain_offload.activations.memory import HostMemory
from drivetrain_offload.activations.plugin import ActivationOffloadSection
from drivetrain_offload.activations.saved import ActivationOffloader
from drivetrain_offload.file_io import AsyncFile
from torch import nn

from drivetrain.job.accelerator_choice import choose_accelerator
from drivetrain.testing.models import TinyGPT

CPU = torch.device("cpu")


class Lagging:
    """Copies in order, as late as a device may; memory that was freed by then is an error."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Lag, torch.Tensor, torch.Tensor]] = deque()
        self.freed = 0

    def mark(self) -> Lag:
        return Lag(self)

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Any = ()) -> Lag:
        end = Lag(self)
        for target, source in pairs:
            self.queue.append((end, target, source))
        return end

    def run_to(self, mark: Lag) -> None:
        while any(end is mark for end, _, _ in self.queue):
            _, target, source = self.queue.popleft()
            # Held here by a name and an argument; of the tensor on the device, also by its owner.
            self.freed += max(sys.getrefcount(target), sys.getrefcount(source)) <= 2
            target.copy_(source)


class Lag:
    def __init__(self, stream: Lagging) -> None:
        self._stream = stream

    def wait(self) -> None:
        self._stream.run_to(self)

    def synchronize(self) -> None:
        self._stream.run_to(self)


@pytest.fixture(params=["host", "file"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    accelerator = choose_accelerator()
    module = gpt()
    stream = Lagging()
    with AsyncFile(tmp_path / "activations", mode="x") as file:
        memory: Any = HostMemory(accelerator, CPU, pin=False)
        if request.param == "file":
            memory = FileMemory(accelerator, CPU, file, pin=False)
            memory.direct = False
        memory.copies = stream
        section = ActivationOffloadSection(enabled=True, min_bytes=1)
        ActivationOffloader(module, memory, section)
        yield module, memory, stream


def gpt() -> nn.Module:
    torch.manual_seed(1)
    return TinyGPT(layers=5)


def loss_of(module: nn.Module, seed: int) -> torch.Tensor:
    batch = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(seed))
    return module(batch[:, :-1], batch[:, 1:])


def test_whatever_is_used_was_waited_for(made: Any) -> None:
    module, memory, stream = made
    plain = gpt()
    for step in range(3):
        for each in (module, plain):
            each.zero_grad()
            loss_of(each, step).backward()
        pairs = zip(module.parameters(), plain.parameters(), strict=True)
        assert all(torch.equal(p.grad, q.grad) for p, q in pairs)
    assert stream.freed == 0
    assert memory.pool.in_use == 0


def test_nothing_is_freed_while_it_is_copied(made: Any) -> None:
    module, memory, stream = made
    loss = loss_of(module, 0)
    del loss  # no backward
    loss = loss_of(module, 1)
    # Backward ends here, so that blocks which were fetched ahead are never used.
    torch.autograd.grad(loss, module.blocks[3].up.weight)
    del loss
    gc.collect()
    assert stream.freed == 0
    assert memory.pool.in_use == 0
    assert not stream.queue


def test_a_part_of_the_graph_that_is_dropped_in_forward_is_copied_to_its_end(made: Any) -> None:
    module, _, stream = made

    def discard(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        output.exp().sum()

    module.blocks[1].up.register_forward_hook(discard)
    loss_of(module, 0).backward()
    assert stream.freed == 0
