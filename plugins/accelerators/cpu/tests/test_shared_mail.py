"""Messages through shared memory arrive in order, whole, and tell when nobody sends any more."""

from __future__ import annotations

import os
import time

import pytest
import torch
from drivetrain_cpu.shared_memory import native_library
from shared_memory_world import TAG, start

from drivetrain.communication.process_group import Ranks
from drivetrain.errors import CommunicationError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import RanksFailedError, run_distributed

COUNT = 50


@pytest.fixture(scope="module", autouse=True)
def built():
    """Ranks find the kernels in the cache instead of building them all at once."""
    native_library()


def message(number, sender):
    """Sizes that grow and shrink, some of them empty."""
    return torch.full(((number * 7919) % 40_000,), number + 1000 * sender, dtype=torch.int32)


def all_to_all_messages():
    c = start()
    size, rank = c.size("data"), c.rank("data")
    others = [other for other in range(size) if other != rank]
    handles, coming = [], []
    for number in range(COUNT):
        inbox = [(torch.empty_like(message(number, other)), other) for other in others]
        outbox = [(message(number, rank), other) for other in others]
        handles.append(c.send_receive(outbox, inbox, "data", TAG, asynchronous=True))
        coming.append(inbox)
        if number % 5 == 4:  # waited for in any order
            for handle in reversed(handles):
                handle.wait()
            handles.clear()
        c.all_reduce(torch.ones(3), "data", TAG)
    for number, inbox in enumerate(coming):
        for tensor, other in inbox:
            assert torch.equal(tensor, message(number, other))
    assert set(c.inner.carried) == set(), "everything went through memory"
    c.barrier("data", TAG)
    c.close()


@pytest.mark.parametrize("world", [2, 3])
def test_messages_arrive_whole_and_in_order(world):
    run_distributed(all_to_all_messages, world)


def sender_ahead():
    c = start()
    if c.rank("data") == 0:
        for number in range(COUNT):
            c.send(torch.full((5,), number), "data", TAG, to=1)
    else:
        time.sleep(0.3)  # meanwhile the sender waits for room
        for number in range(COUNT):
            tensor = torch.empty(5, dtype=torch.int64)
            c.receive(tensor, "data", TAG, source=0)
            assert tensor.tolist() == [number] * 5
    c.barrier("data", TAG)
    c.close()


def test_a_sender_may_be_far_ahead():
    run_distributed(sender_ahead, 2)


def other_shape(like):
    c = start()
    if c.rank("data") == 0:
        c.send(torch.ones(5), "data", TAG, to=1)
        c.barrier("data", TAG)
    else:
        with pytest.raises(
            CommunicationError, match="rank 0 sent a message of another shape or dtype"
        ):
            c.receive(like, "data", TAG, source=0)
        c.barrier("data", TAG)
    c.close()


@pytest.mark.parametrize("like", [torch.ones(6), torch.ones(5, dtype=torch.int32)])
def test_a_message_of_another_shape_or_dtype_is_refused(like):
    run_distributed(other_shape, 2, like)


def sender_dies():
    c = start()
    c.barrier("data", TAG)
    if c.rank("data") == 0:
        os._exit(3)
    with pytest.raises(CommunicationError, match="rank 0 died"):
        c.receive(torch.ones(6), "data", TAG, source=0)


def test_a_sender_that_dies_is_noticed():
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(sender_dies, 2)
    assert "rank 1" not in str(caught.value).splitlines()[0]


# -- ranks that wait for each other ----------------------------------------------------------------


def opened():
    config = {"train_micro_batch_size_per_gpu": 1}
    return Job.open(Plan.build(config, world_size=Ranks.current().world_size))


def receive_first():
    """Every rank of a ring receives before it sends."""
    with opened() as job:
        c, size, rank = job.communicator, job.world_size, job.rank
        c.receive(torch.empty(3), "data", TAG, source=(rank - 1) % size)
        c.send(torch.ones(3), "data", TAG, to=(rank + 1) % size)


def another_peer():
    """The last rank of a ring sends past the first, and all go on to a sum."""
    with opened() as job:
        c, size, rank = job.communicator, job.world_size, job.rank
        to = (rank + 1) % size if rank < size - 1 else 1
        out, into = [(torch.ones(3), to)], [(torch.empty(3), (rank - 1) % size)]
        c.send_receive(out, into, "data", TAG)
        c.all_reduce(torch.ones(3), "data", TAG)


@pytest.mark.parametrize(
    ("function", "world", "circle"),
    [
        (receive_first, 2, "message 1 from rank 0 to rank 1 on rank 0"),
        (another_peer, 4, "rank 0 for message 1 from rank 3 to rank 0 on rank 3"),
    ],
)
def test_messages_that_nobody_issues_end_and_name_who_waits(function, world, circle):
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(function, world, timeout=60)
    assert set(caught.value.errors) == set(range(world))
    assert any(
        "ranks wait for each other: rank" in error.error and circle in error.error
        for error in caught.value.errors.values()
    )
