"""Several messages issued as one: rings, pipeline stages, and ranks that do not agree."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

import drivetrain
from drivetrain.communication.byte_log import ByteLog
from drivetrain.communication.mesh import Mesh
from drivetrain.communication.torch_communicator import TorchCommunicator
from drivetrain.contracts import Purpose, Tag
from drivetrain.plan.mesh_layout import MeshLayout
from drivetrain.testing import run_distributed
from drivetrain.testing.distributed import RanksFailedError

TAG = Tag(Purpose.ACTIVATION, site="test")
F64 = torch.float64
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}


def start() -> ByteLog:
    dist.init_process_group("gloo")
    mesh = Mesh(MeshLayout.build(dist.get_world_size()), dist.get_rank())
    return ByteLog(TorchCommunicator(mesh, torch.device("cpu")))


def inputs(number: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=F64, generator=generator) for _ in range(number)]


def a_ring() -> None:
    """Keys and values go around while each rank attends with what it has, as in ring attention."""
    c = start()
    size, rank = c.size("data"), c.rank("data")
    queries, keys, values = (inputs(3 * size, 5, 4)[n::3] for n in range(3))
    scores = queries[rank] @ torch.cat(keys).t()
    expected = scores.exp() @ torch.cat(values) / scores.exp().sum(1, keepdim=True)
    key, value = keys[rank].clone(), values[rank].to(torch.float32)
    total, weight = torch.zeros(5, 4, dtype=F64), torch.zeros(5, 1, dtype=F64)
    for turn in range(size):
        coming = torch.empty_like(key), torch.empty_like(value)
        handle = None
        if turn + 1 < size:
            handle = c.send_receive(
                [(t, (rank + 1) % size) for t in (key, value)],
                [(t, (rank - 1) % size) for t in coming],
                "data", TAG, asynchronous=True,
            )  # fmt: skip
        scores = (queries[rank] @ key.t()).exp()
        total, weight = total + scores @ value.double(), weight + scores.sum(1, keepdim=True)
        if handle is not None:
            handle.wait()
            handle.wait()
            key, value = coming
    assert torch.allclose(total / weight, expected, rtol=1e-6)
    traffic = c.total(op="send_receive")
    assert traffic.calls == size - 1
    assert traffic.sent_bytes == (size - 1) * 20 * (8 + 4)
    assert traffic.payload_bytes == 2 * traffic.sent_bytes


@pytest.mark.parametrize("world", [2, 4])
def test_keys_and_values_go_around_a_ring(world: int) -> None:
    run_distributed(a_ring, world)


def stages() -> None:
    """Stages in a line, one forward and one backward in turn (1F1B)."""
    c = start()
    size, rank = c.size("data"), c.rank("data")
    micro, weights = inputs(6, 3, 4), inputs(size, 4, 4)
    whole = [w.clone().requires_grad_() for w in weights]
    for x in micro:
        for w in whole:
            x = (x @ w).tanh()
        (x**2).sum().backward()
    weight = weights[rank].clone().requires_grad_()
    first, last = rank == 0, rank == size - 1
    ins, outs = [], []

    def move(send: list[Any], receive: list[tuple[bool, int]]) -> list[torch.Tensor]:
        came = [torch.empty(3, 4, dtype=F64) for _ in receive]
        from_ = [(t, peer) for t, (_, peer) in zip(came, receive, strict=True)]
        c.send_receive(send, from_, "data", TAG)
        return came

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        y = (x @ weight).tanh()
        ins.append(x)
        outs.append((y**2).sum() if last else y)
        return y.detach()

    def backward(gradient: torch.Tensor | None) -> torch.Tensor:
        x, y = ins.pop(0), outs.pop(0)
        y.backward(gradient)
        assert x.grad is not None
        return x.grad

    ahead = size - 1 - rank
    x_of = iter(micro)
    before = [] if first else [(True, rank - 1)]
    after = [] if last else [(False, rank + 1)]

    def activation() -> torch.Tensor:
        return next(x_of) if first else move([], before)[0]

    for _ in range(ahead):  # one message alone
        move([] if last else [(forward(activation()), rank + 1)], [])
    x = activation()
    for turn in range(6 - ahead):
        y = forward(x)
        gradient = None if last else move([(y, rank + 1)], after)[0]
        gx = backward(gradient)
        more = turn + 1 < 6 - ahead
        if first:
            x = next(x_of) if more else x
        else:
            came = move([(gx, rank - 1)], before if more else [])
            x = came[0] if more else x
    for _ in range(ahead):
        gx = backward(None if last else move([], after)[0])
        if not first:
            move([(gx, rank - 1)], [])
    assert whole[rank].grad is not None
    assert torch.allclose(weight.grad, whole[rank].grad, rtol=1e-10)
    sent = 6 * 96 * ((not first) + (not last))
    assert c.total().sent_bytes == sent
    assert c.total().payload_bytes == 2 * sent
    assert c.send_receive([], [], "data", TAG) is not None


@pytest.mark.parametrize("world", [2, 4])
def test_stages_in_one_forward_one_backward_agree_with_one_process(world: int) -> None:
    run_distributed(stages, world)


def engine() -> Any:
    torch.manual_seed(0)
    return drivetrain.initialize(model=nn.Linear(2, 1), config=CONFIG)[0]


def soon() -> Any:
    """Compare after a tenth of a second."""
    return patch("drivetrain.communication.torch_communicator.LONG", timedelta(seconds=0.1))


def late() -> list[float]:
    """A sender that is late, then a receiver, and a batch that is waited for several times."""
    job = engine().job
    c, results = job.communicator, []
    with soon():
        for sleeper in (0, 1):
            time.sleep(0.6 * (job.rank == sleeper))
            out = torch.zeros(3)
            mine = torch.full((3,), job.rank + 1.0)
            c.send_receive([(mine, 1 - job.rank)], [(out, 1 - job.rank)], "data", TAG)
            results.append(float(out.sum()))
    return results


GLOO = {"DRIVETRAIN_DISABLE_PLUGINS": "drivetrain-cpu"}


@pytest.mark.parametrize("env", [GLOO, {}])
def test_late_messages_are_waited_for(env: dict[str, str]) -> None:
    assert run_distributed(late, 2, env=env) == [[6.0, 6.0], [3.0, 3.0]]


def unlike(second: tuple[int, torch.dtype]) -> None:
    """The second of two messages is not what the other side expects."""
    job = engine().job
    numel, dtype = second if job.rank == 1 else (4, torch.float32)
    messages = [(torch.ones(2), 1 - job.rank), (torch.ones(numel, dtype=dtype), 1 - job.rank)]
    with soon():
        if job.rank == 0:
            job.communicator.send_receive(messages, [], "data", TAG)
        else:
            job.communicator.send_receive([], messages, "data", TAG)


@pytest.mark.parametrize("second", [(3, torch.float32), (4, torch.int32)])
def test_messages_of_other_sizes_or_dtypes_are_named_on_both_ranks(second: Any) -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(unlike, 2, second, env=GLOO, timeout=60)
    assert set(caught.value.errors) == {0, 1}
    for error in caught.value.errors.values():
        assert "message 2 from rank 0 to rank 1 is" in error.error
        assert "4 x float32" in error.error


def receive_first() -> None:
    """Every rank of a ring receives before it sends."""
    job = engine().job
    c, size, rank = job.communicator, job.world_size, job.rank
    with soon():
        c.receive(torch.empty(3), "data", TAG, source=(rank - 1) % size)
        c.send(torch.ones(3), "data", TAG, to=(rank + 1) % size)


def another_peer() -> None:
    """The last rank of a ring sends past the first, and all go on to a sum."""
    job = engine().job
    c, size, rank = job.communicator, job.world_size, job.rank
    to = (rank + 1) % size if rank < size - 1 else 1
    with soon():
        c.send_receive([(torch.ones(3), to)], [(torch.empty(3), (rank - 1) % size)], "data", TAG)
        c.all_reduce(torch.ones(3), "data", TAG)


@pytest.mark.parametrize(
    ("function", "world", "circle"),
    [
        (receive_first, 2, "message 1 from rank 0 to rank 1 on rank 0"),
        (another_peer, 4, "rank 3 for message 1 from rank 3 to rank 1 on rank 1"),
    ],
)
def test_messages_that_nobody_issues_end_and_name_who_waits(
    function: Any, world: int, circle: str
) -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(function, world, env=GLOO, timeout=60)
    assert set(caught.value.errors) == set(range(world))
    for error in caught.value.errors.values():
        assert "ranks wait for each other: rank" in error.error
        assert circle in error.error


def one_is_late() -> None:
    """Ranks wait in a line for one that is late, with a message that goes the other way."""
    job = engine().job
    c, size, rank = job.communicator, job.world_size, job.rank
    with soon():
        back = None
        if rank:
            back = c.send(torch.ones(2), "data", TAG, to=rank - 1, asynchronous=True)
            c.receive(torch.empty(3), "data", TAG, source=rank - 1)
        else:
            time.sleep(1)
        if rank < size - 1:
            c.send(torch.ones(3), "data", TAG, to=rank + 1)
            time.sleep(0.3)
            c.receive(torch.empty(2), "data", TAG, source=rank + 1)
        if back is not None:
            back.wait()
        c.all_reduce(torch.ones(3), "data", TAG)


def test_ranks_that_wait_in_a_line_are_not_taken_for_a_circle() -> None:
    run_distributed(one_is_late, 3, env=GLOO)
