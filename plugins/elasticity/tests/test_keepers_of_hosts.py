"""Copies of jobs on several hosts: what is left of them when a host is lost with its keeper.

Here a "host" is a keeper of its own: ranks of one machine are told to use different ones.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from drivetrain_elasticity import resume
from drivetrain_elasticity.client import KeeperError
from drivetrain_elasticity.hosts import newest_of
from drivetrain_elasticity.keeper import OWNER
from drivetrain_elasticity.keeper_storage import KeeperStorage
from drivetrain_elasticity.peers import receive, send
from drivetrain_elasticity.survival import Survival

import drivetrain
from drivetrain.errors import CheckpointError
from drivetrain.plan.registry import Registry
from drivetrain.testing import data, run_distributed
from drivetrain.testing.models import mlp

REGISTRY = Registry.installed().with_plugins(Survival)

End = Callable[[str], None]


@pytest.fixture
def hosts() -> Iterator[tuple[list[str], End]]:
    """Processes that keepers belong to, and what ends one of them with its keeper."""
    command = [sys.executable, "-c", "input()"]
    found = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(3)]

    def end(owner: str) -> None:
        storage = keeper_of(owner)
        next(p for p in found if str(p.pid) == owner).communicate(b"\n")
        assert storage._client._socket.recv(1) == b""  # which is when the keeper has ended

    yield [str(process.pid) for process in found], end
    for process in found:
        if process.poll() is None:
            process.communicate(b"\n")


def keeper_of(owner: str, place: str = "keeper://survival") -> KeeperStorage:
    before = os.environ.get(OWNER)
    os.environ[OWNER] = owner
    try:
        return KeeperStorage(place)
    finally:
        del os.environ[OWNER]
        if before is not None:
            os.environ[OWNER] = before


def trained(
    owners: list[str], steps: int, save_dir: str | None = None
) -> tuple[str | None, int, list[float], list[torch.Tensor]]:
    """Where a job went on from, and at which step; its losses; its weights at the end."""
    os.environ[OWNER] = owners[int(os.environ["RANK"])]
    config = {
        "train_batch_size": 6,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "survival": {"every": 2},
    }
    samples = list(zip(*data.vectors(48), strict=True))
    engine = drivetrain.initialize(
        model=mlp(), config=config, training_data=samples, registry=REGISTRY
    )[0]
    place, _ = resume(engine, save_dir)
    start = engine.global_steps
    losses = [float(engine.train_batch()) for _ in range(steps - start)]
    weights = [p.detach().clone() for p in engine.module.parameters()]
    engine.job.close()
    return place, start, losses, weights


@pytest.mark.parametrize("lost", [0, 1], ids=["the host of rank 0", "the other host"])
def test_the_loss_of_a_host_costs_no_read_from_disk(
    hosts: tuple[list[str], End], lost: int
) -> None:
    (one, two, other), end = hosts
    run_distributed(trained, 2, [one, two], 5)  # the copy is that of step 4
    end((one, two)[lost])
    left = (two, one)[lost]
    place, start, losses, weights = run_distributed(trained, 2, [left, left], 8)[0]
    assert (place, start) == ("keeper://survival/copy", 4)
    _, _, expected, expected_weights = run_distributed(trained, 2, [other, other], 8)[0]
    assert losses == expected[4:]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected_weights, strict=True))


def test_a_new_host_reads_from_the_others_and_an_old_copy_is_forgotten(
    hosts: tuple[list[str], End],
) -> None:
    (one, two, three), _ = hosts
    run_distributed(trained, 2, [one, two], 3)  # both have the copy of step 2
    run_distributed(trained, 2, [one, one], 5)  # the second host is away: it keeps that of step 2
    old = keeper_of(two).get("copy/manifest.json", 1 << 20)
    found = run_distributed(trained, 2, [three, two], 5)  # of which neither has that of step 4
    assert [each[1] for each in found] == [2, 2]
    found = run_distributed(trained, 2, [two, one], 7)
    assert [each[1] for each in found] == [4, 4]
    assert keeper_of(two).get("copy/manifest.json", 1 << 20) != old
    names = keeper_of(two).names_here("copy")
    assert len([name for name in names if name.endswith(".safetensors")]) == 2


def test_a_copy_that_is_not_whole_is_left_for_what_is_on_the_disk(
    hosts: tuple[list[str], End], tmp_path: Path
) -> None:
    owners, end = hosts
    run_distributed(trained, 3, owners, 5)
    run_distributed(saved, 1, str(tmp_path))
    end(owners[1])
    end(owners[2])  # with the only copies of what rank 1 had
    place, start, _, _ = run_distributed(trained, 1, [owners[0]], 4, str(tmp_path))[0]
    assert (place, start) == (str(tmp_path / "global_step3"), 3)


def saved(folder: str) -> None:
    config = {"train_batch_size": 6, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
    samples = list(zip(*data.vectors(48), strict=True))
    engine = drivetrain.initialize(model=mlp(), config=config, training_data=samples)[0]
    for _ in range(3):
        engine.train_batch()
    engine.save_checkpoint(folder)
    engine.job.close()


@pytest.fixture
def pair(hosts: tuple[list[str], End]) -> tuple[KeeperStorage, KeeperStorage, int, End]:
    """Two keepers that work together, the port of the second, and what ends its host."""
    (first, second, _), end = hosts
    one, two = keeper_of(first), keeper_of(second)
    ports = [one.listen("127.0.0.1"), two.listen("127.0.0.1")]
    every = [
        [one.keeper_id(), "127.0.0.1", ports[0]],
        [two.keeper_id(), "127.0.0.1", ports[1]],
    ]
    for each in (one, two):
        each.join("token", every)
    return one, two, ports[1], lambda _: end(second)


def test_a_file_is_on_the_next_host_when_the_write_has_ended(
    pair: tuple[KeeperStorage, KeeperStorage, int, End],
) -> None:
    one, two, _, _ = pair
    with one.writing("copy/data") as sink:
        sink.write(b"0123456789")
    assert two.names_here("copy") == ["data"]
    one.remove_here("copy/data")
    found = bytearray(4)
    one.read("copy/data", 3, found)  # from the other host, and only that part
    assert (found, one.size("copy/data"), one.names("copy")) == (b"3456", 10, ["data"])
    with pytest.raises(CheckpointError, match="it ends at byte 10, but 12 are needed"):
        one.read("copy/data", 8, bytearray(4))
    whole = os.urandom(16 << 20)  # more than the buffers of a connection hold
    one.put("copy/whole", whole)
    assert two.names_here("copy") == ["data", "whole"]
    one.remove_here("copy/whole")
    assert one.get("copy/whole", 1 << 30) == whole
    one.remove("copy/whole")
    one.remove("copy/data")
    one.put("copy/end", b"")  # what is removed goes the same way, before this
    assert two.names_here("copy") == ["end"]


def test_a_copy_that_no_other_host_takes_is_an_error(
    pair: tuple[KeeperStorage, KeeperStorage, int, End],
) -> None:
    one, _, _, end = pair
    end("")
    with pytest.raises(
        KeeperError, match="no other host has taken a copy of survival/copy/data: the kee"
    ):
        one.put("copy/data", b"0123")


def test_a_stranger_is_not_answered(pair: tuple[KeeperStorage, KeeperStorage, int, End]) -> None:
    _, two, port, _ = pair
    two.put("copy/data", b"0123")
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        send(stranger, {"token": "guess"})
        send(stranger, {"do": "read", "path": "survival/copy/data", "offset": 0, "count": 4})
        with pytest.raises(OSError, match=r"has ended|reset"):
            receive(stranger)


def test_the_newest_copy_is_the_one_that_no_other_continues() -> None:
    first = {"id": "a", "history": [], "saved_at": "2026-01-01T00:00:03"}  # its clock was ahead
    second = {"id": "b", "history": ["a"], "saved_at": "2026-01-01T00:00:02"}
    assert newest_of([first, second]) == newest_of([second, first]) == "b"
    other = {"id": "c", "history": [], "saved_at": "2026-01-01T00:00:04"}
    assert newest_of([first, second, other]) == "c"
    assert newest_of([]) is None
