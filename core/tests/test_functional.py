"""Gradients of collectives against autograd of the same function on one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from drivetrain.communication.byte_log import ByteLog
from drivetrain.communication.functional import Functional, functional
from drivetrain.communication.mesh import Mesh
from drivetrain.communication.torch_communicator import TorchCommunicator
from drivetrain.contracts import Purpose, Tag
from drivetrain.plan.mesh_layout import MeshLayout
from drivetrain.testing import run_distributed

WORLDS = (2, 3)


def start() -> Functional:
    dist.init_process_group("gloo")
    mesh = Mesh(MeshLayout.build(dist.get_world_size()), dist.get_rank())
    communicator = TorchCommunicator(mesh, torch.device("cpu"))
    return functional(communicator, "data", Tag(Purpose.ACTIVATION, site="test"))


def inputs(world: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """What every rank starts from; each rank makes them all."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(world)]


def loss_of(y: torch.Tensor, rank: int) -> torch.Tensor:
    """A loss whose gradient differs in every element and on every rank."""
    weights = torch.arange(y.numel(), dtype=y.dtype).view(y.shape) / 7 + rank
    return (weights * y.sin()).sum()


Collective = Callable[[Functional, torch.Tensor], torch.Tensor]
Global = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def uneven(world: int, rank: int) -> list[int]:
    """Rows that ``rank`` sends to each other rank; 2 * world in all."""
    rows = [2] * world
    rows[rank] += 1
    rows[(rank + 1) % world] -= 1
    return rows


def exchange(f: Functional, x: torch.Tensor) -> torch.Tensor:
    received = [uneven(f.size, other)[f.rank] for other in range(f.size)]
    return f.exchange(x, received, uneven(f.size, f.rank))


# What each collective is as a function of the inputs of all ranks at once.
SUMMED: dict[str, tuple[Collective, Global]] = {
    "all_reduce": (Functional.all_reduce, lambda xs: [sum(xs)] * len(xs)),
    "all_gather": (Functional.all_gather, lambda xs: [torch.cat(xs)] * len(xs)),
    "all_gather along 1": (
        lambda f, x: f.all_gather(x, 1),
        lambda xs: [torch.cat(xs, 1)] * len(xs),
    ),
    "reduce_scatter": (Functional.reduce_scatter, lambda xs: list(sum(xs).chunk(len(xs)))),
    "reduce_scatter along -1": (
        lambda f, x: f.reduce_scatter(x, -1),
        lambda xs: list(sum(xs).chunk(len(xs), -1)),
    ),
    "broadcast": (lambda f, x: f.broadcast(x, 1), lambda xs: [xs[1]] * len(xs)),
    "all_to_all 0 to 0": (
        Functional.all_to_all,
        lambda xs: [torch.cat([x.chunk(len(xs))[r] for x in xs]) for r in range(len(xs))],
    ),
    "all_to_all 1 to 2": (
        lambda f, x: f.all_to_all(x, 1, 2),
        lambda xs: [torch.cat([x.chunk(len(xs), 1)[r] for x in xs], 2) for r in range(len(xs))],
    ),
    "all_to_all 2 to 0": (
        lambda f, x: f.all_to_all(x, 2, 0),
        lambda xs: [torch.cat([x.chunk(len(xs), 2)[r] for x in xs], 0) for r in range(len(xs))],
    ),
    "exchange": (
        exchange,
        lambda xs: [
            torch.cat([x.split(uneven(len(xs), s))[r] for s, x in enumerate(xs)])
            for r in range(len(xs))
        ],
    ),
}


def summed(name: str) -> None:
    f = start()
    collective, whole = SUMMED[name]
    shape = (2 * f.size, f.size, 3 * f.size)
    everyone = [x.requires_grad_() for x in inputs(f.size, shape)]
    expected = whole(everyone)
    sum(loss_of(y, rank) for rank, y in enumerate(expected)).backward()

    x = inputs(f.size, shape)[f.rank].requires_grad_()
    y = collective(f, x)
    assert torch.allclose(y, expected[f.rank], rtol=1e-12)
    loss_of(y, f.rank).backward()
    reference = everyone[f.rank].grad
    if reference is None:  # what a broadcast does not send has no influence
        reference = torch.zeros_like(x)
    assert torch.allclose(x.grad, reference, rtol=1e-12)
    assert torch.equal(x.detach(), inputs(f.size, shape)[f.rank]), "the argument was changed"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", SUMMED)
def test_gradient_of_the_sum_of_all_losses(name, world):
    run_distributed(summed, world, name)


def tensor_parallel_mlp() -> None:
    """Column-parallel then row-parallel, as in Megatron-LM; the loss is replicated."""
    f = start()
    x, first, second = inputs(3, (6, 6))
    for tensor in (x, first, second):
        tensor.requires_grad_()
    expected = loss_of((x @ first).tanh() @ second, 0)
    expected.backward()
    reference = [tensor.grad.clone() for tensor in (x, first, second)]

    mine = x.detach().requires_grad_()
    columns = first.detach().chunk(f.size, 1)[f.rank].requires_grad_()
    rows = second.detach().chunk(f.size, 0)[f.rank].requires_grad_()
    y = f.reduce((f.copy(mine) @ columns).tanh() @ rows)
    loss = loss_of(y, 0)
    loss.backward()
    assert torch.allclose(loss, expected, rtol=1e-12)
    assert torch.allclose(mine.grad, reference[0], rtol=1e-10)
    assert torch.allclose(columns.grad, reference[1].chunk(f.size, 1)[f.rank], rtol=1e-10)
    assert torch.allclose(rows.grad, reference[2].chunk(f.size, 0)[f.rank], rtol=1e-10)


@pytest.mark.parametrize("world", WORLDS)
def test_copy_and_reduce_make_a_tensor_parallel_mlp(world):
    run_distributed(tensor_parallel_mlp, world)


def split_and_gather() -> None:
    f = start()
    (x,) = inputs(1, (3, 6))
    x.requires_grad_()
    loss_of(x.exp(), 0).backward()
    mine = x.detach().requires_grad_()
    y = f.gather(f.split(mine, 1).exp(), 1)
    loss_of(y, 0).backward()
    assert torch.allclose(y, x.exp())
    assert torch.allclose(mine.grad, x.grad, rtol=1e-12)


@pytest.mark.parametrize("world", WORLDS)
def test_split_and_gather_are_the_identity_on_a_replicated_value(world):
    run_distributed(split_and_gather, world)


def second_derivatives() -> None:
    f = start()
    everyone = [x.requires_grad_() for x in inputs(f.size, (4,))]
    total = sum(everyone)
    losses = sum(loss_of(total, rank) for rank in range(f.size))
    firsts = torch.autograd.grad(losses, everyone, create_graph=True)
    sum((g**2).sum() for g in firsts).backward()

    x = inputs(f.size, (4,))[f.rank].requires_grad_()
    (first,) = torch.autograd.grad(loss_of(f.all_reduce(x), f.rank), x, create_graph=True)
    (first**2).sum().backward()
    assert torch.allclose(x.grad, everyone[f.rank].grad, rtol=1e-12)


def test_gradients_can_be_differentiated_again():
    run_distributed(second_derivatives, 2)


def compiled(name: str) -> None:
    f = start()
    collective, _ = SUMMED[name]
    shape = (2 * f.size, f.size, 3 * f.size)

    def step(x: torch.Tensor) -> torch.Tensor:
        return loss_of(collective(f, x * 2).tanh(), 3)

    results = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        x = inputs(f.size, shape)[f.rank].requires_grad_()
        loss = run(x)
        loss.backward()
        results.append((loss.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-12)


@pytest.mark.parametrize("name", ["all_reduce", "reduce_scatter along -1", "exchange"])
def test_compiles_into_one_graph(name):
    run_distributed(compiled, 2, name)


def compiled_pairs() -> None:
    f = start()

    def step(x: torch.Tensor) -> torch.Tensor:
        return f.gather(f.split(f.reduce(f.copy(x).sin())), 0).cos().sum()

    graph = torch.compile(step, backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (step, graph):
        x = inputs(1, (4, 3))[0].requires_grad_()
        run(x).backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, rtol=1e-12)


def test_replicated_pairs_compile_into_one_graph():
    run_distributed(compiled_pairs, 2)


def counted_without_memory(name: str) -> list[float]:
    """Bytes that leave a rank of real tensors, forward and backward, and of some without memory."""
    f = start()
    log = ByteLog(f.communicator)
    f = functional(log, f.axis, f.tag)
    found = []
    for device in ("cpu", "meta"):
        x = torch.ones(2 * f.size, f.size, f.size, device=device, requires_grad=True)
        log.reset()
        collective = SUMMED[name][0] if name in SUMMED else lambda f, x: f.start(name, x).wait()
        collective(f, x).sum().backward()
        found.append(log.total().sent_bytes)
    return found


@pytest.mark.parametrize("name", ["all_gather", "exchange", "reduce"])
def test_a_rehearsal_counts_what_ranks_send(name):
    for real, rehearsed in run_distributed(counted_without_memory, 2, name):
        assert real == rehearsed > 0
