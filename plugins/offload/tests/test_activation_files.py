"""Activations that wait in files, against plain torch."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_offload.activations.files import FileMemory, Slots
from drivetrain_offload.activations.plugin import ActivationOffload, ActivationOffloadSection
from drivetrain_offload.activations.saved import ActivationOffloader
from drivetrain_offload.file_io import AsyncFile, FileIOError
from drivetrain_offload.file_io.faults import Faults
from torch import nn

from drivetrain.contracts import Phase
from drivetrain.job.accelerator_choice import choose_accelerator
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import PluginConformance
from drivetrain.testing.models import TinyGPT

LAYERS = 6
CPU = torch.device("cpu")
Made = tuple[nn.Module, FileMemory]


class TestPlugin(PluginConformance):
    plugin = ActivationOffload
    config = {"activation_offload": {"enabled": True, "device": "nvme", "nvme_path": "/disk"}}


@pytest.fixture
def file(tmp_path: Path) -> Iterator[AsyncFile]:
    with AsyncFile(tmp_path / "activations", mode="x") as opened:
        yield opened


@pytest.fixture(params=[True, False], ids=["direct", "through-buffers"])
def make(request: pytest.FixtureRequest, file: AsyncFile) -> Callable[..., Made]:
    """Moves a model's activations from where they are, or as from a device that is not the host."""

    def made(**section: Any) -> Made:
        memory = FileMemory(choose_accelerator(), CPU, file, pin=False)
        memory.direct = request.param
        module = gpt()
        values = {"enabled": True, "device": "nvme", "nvme_path": "-", "min_bytes": 1, **section}
        ActivationOffloader(module, memory, ActivationOffloadSection(**values))
        return module, memory

    return made


def gpt() -> nn.Module:
    torch.manual_seed(1)
    return TinyGPT(layers=LAYERS)


def loss_of(module: nn.Module, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(64, (2, 9), generator=generator)
    return module(batch[:, :-1], batch[:, 1:])


def same_gradients(module: nn.Module, plain: nn.Module) -> bool:
    pairs = zip(module.parameters(), plain.parameters(), strict=True)
    return all(torch.equal(p.grad, q.grad) for p, q in pairs)


def test_gradients_are_those_of_plain_torch(make: Callable[..., Made]) -> None:
    module, memory = make()
    plain = gpt()
    for step in range(3):
        for each in (module, plain):
            each.zero_grad()
            loss_of(each, step).backward()
        assert same_gradients(module, plain)
    assert memory.slots.in_use == memory.pool.in_use == 0


def test_a_graph_may_be_used_twice(make: Callable[..., Made]) -> None:
    module, _ = make(keep_last=0)
    plain = gpt()
    for each in (module, plain):
        loss = loss_of(each)
        loss.backward(retain_graph=True)
        loss.backward()
    assert same_gradients(module, plain)


def test_forward_fills_the_file_and_later_steps_use_the_same_places(
    make: Callable[..., Made], file: AsyncFile
) -> None:
    module, memory = make()
    sizes = []
    for step in range(3):
        loss = loss_of(module, step)
        assert memory.slots.in_use > 0
        loss.backward()
        file.wait()
        sizes.append(file.size())
    assert sizes[0] > 0
    assert len(set(sizes)) == 1


def test_host_memory_on_the_way_is_bounded(file: AsyncFile) -> None:
    """After forward, all but a few activations are in the file alone."""
    memory = FileMemory(choose_accelerator(), CPU, file, pin=False)
    memory.direct = False
    module = gpt()
    section = ActivationOffloadSection(enabled=True, min_bytes=1, keep_last=0)
    ActivationOffloader(module, memory, section)
    loss = loss_of(module)
    assert memory.slots.in_use > 10 * memory.pool.in_use
    loss.backward()


def test_a_graph_that_is_dropped_gives_its_places_back(make: Callable[..., Made]) -> None:
    module, memory = make()
    loss = loss_of(module)
    del loss
    gc.collect()
    assert memory.slots.in_use == memory.pool.in_use == 0


def test_places_do_not_overlap_and_are_used_again() -> None:
    slots = Slots()
    taken = [(slots.take(nbytes), nbytes) for nbytes in (1, 5000, 4096, 70_000, 5000)]
    spans = sorted((offset, offset + nbytes) for offset, nbytes in taken)
    assert all(first[1] <= second[0] for first, second in pairwise(spans))
    assert all(offset % 4096 == 0 for offset, _ in taken)
    slots.give(*taken[1])
    assert slots.take(4500) == taken[1][0]


def faulty(monkeypatch: pytest.MonkeyPatch, *, writes: bool, after: int) -> None:
    """Make one write or read fail as a broken disk does."""
    seen = [0]

    def next_fault(is_write: bool) -> int:
        seen[0] += is_write is writes
        return errno.EIO if is_write is writes and seen[0] == after else 0

    monkeypatch.setattr(Faults, "next", next_fault)


def test_a_write_that_fails_is_an_error_of_forward(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, memory = make()
    faulty(monkeypatch, writes=True, after=3)
    with pytest.raises(FileIOError, match=r"cannot write to .*activations.*see the kernel's log"):
        loss_of(module)
    monkeypatch.undo()
    loss_of(module).backward()  # the next one may be better
    gc.collect()
    assert memory.slots.in_use == memory.pool.in_use == 0


def test_a_read_that_fails_is_an_error_of_backward(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = make(keep_last=0)
    faulty(monkeypatch, writes=False, after=2)
    loss = loss_of(module)
    with pytest.raises(FileIOError, match=r"cannot read from .*activations"):
        loss.backward()


def test_an_engine_that_only_serves_has_no_activations_to_move() -> None:
    given = {"train_batch_size": 1, "activation_offload": {"enabled": True}}
    with Job.open(Plan.build(given, world_size=1)) as job:
        offered = [job.hub.transform_module(job, nn.Linear(2, 2), t) for t in (True, False)]
    assert [[transform.phase for transform in found] for found in offered] == [[Phase.SURROUND], []]
