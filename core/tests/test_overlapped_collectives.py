"""Started collectives and counted exchanges against autograd of the same on one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from drivetrain.communication.byte_log import ByteLog
from drivetrain.communication.functional import Functional, functional
from drivetrain.communication.mesh import Mesh
from drivetrain.communication.torch_communicator import TorchCommunicator
from drivetrain.contracts import Collective, CommunicatorWrapper, Handle, Purpose, Tag
from drivetrain.errors import CommunicationError
from drivetrain.plan.mesh_layout import MeshLayout
from drivetrain.testing import run_distributed

WORLDS = (2, 4)
F64 = torch.float64


class Events(CommunicatorWrapper):
    """Writes down when a collective is issued and when it is waited for."""

    events: list[str]

    def run(self, collective: Collective) -> Handle:
        kind = str(collective.kind)
        self.events.append(f"start {kind}")
        inner, events = self.inner.run(collective), self.events

        class Noting:
            def wait(self) -> None:
                events.append(f"wait {kind}")
                inner.wait()

        return Noting()


def start() -> tuple[Functional, ByteLog, Events]:
    dist.init_process_group("gloo")
    mesh = Mesh(MeshLayout.build(dist.get_world_size()), dist.get_rank())
    log = ByteLog(TorchCommunicator(mesh, torch.device("cpu")))
    events = Events(log)
    events.events = []
    return functional(events, "data", Tag(Purpose.ACTIVATION, site="test")), log, events


def inputs(number: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=F64, generator=generator) for _ in range(number)]


def loss_of(y: torch.Tensor, rank: int) -> torch.Tensor:
    """A loss whose derivatives differ in every element and on every rank."""
    weights = torch.arange(y.numel(), dtype=y.dtype).view(y.shape) / 7 + rank
    return (weights * y.sin()).sum()


def uneven(world: int, rank: int) -> list[int]:
    """Rows that ``rank`` sends to each other rank; 2 * world in all."""
    rows = [2] * world
    rows[rank] += 1
    rows[(rank + 1) % world] -= 1
    return rows


def came(world: int, rank: int) -> list[int]:
    return [uneven(world, other)[rank] for other in range(world)]


Global = Callable[[list[torch.Tensor]], list[torch.Tensor]]
Ours = Callable[[Functional, torch.Tensor], torch.Tensor]

# What each is as a function of the inputs of all ranks at once.
SUMMED: dict[str, tuple[Ours, Global]] = {
    "all_reduce": (
        lambda f, x: f.start("all_reduce", x).wait(),
        lambda xs: [sum(xs)] * len(xs),  # type: ignore[list-item]
    ),
    "all_gather along 1": (
        lambda f, x: f.start("all_gather", x, 1).wait(),
        lambda xs: [torch.cat(xs, 1)] * len(xs),
    ),
    "reduce_scatter along -1": (
        lambda f, x: f.start("reduce_scatter", x, -1).wait(),
        lambda xs: list(sum(xs).chunk(len(xs), -1)),  # type: ignore[union-attr]
    ),
    "all_to_all 2 to 0": (
        lambda f, x: f.start_all_to_all(x, 2, 0).wait(),
        lambda xs: [torch.cat([x.chunk(len(xs), 2)[r] for x in xs], 0) for r in range(len(xs))],
    ),
    "exchange": (
        lambda f, x: f.start_exchange(x, came(f.size, f.rank), uneven(f.size, f.rank)).wait(),
        lambda xs: [
            torch.cat([x.split(uneven(len(xs), s))[r] for s, x in enumerate(xs)])
            for r in range(len(xs))
        ],
    ),
}


def derivatives(y: torch.Tensor, loss: torch.Tensor, xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """First derivatives, and those of the sum of their squares."""
    firsts = torch.autograd.grad(loss, xs, create_graph=True)
    seconds = torch.autograd.grad(sum((g**2).sum() for g in firsts), xs)  # type: ignore[arg-type]
    return [*firsts, *seconds]


def started_collectives() -> None:
    f, _, events = start()
    shape = (2 * f.size, f.size, 3 * f.size)
    for name, (ours, whole) in SUMMED.items():
        everyone = [x.requires_grad_() for x in inputs(f.size, *shape)]
        expected = whole(everyone)
        total = sum(loss_of(y, rank) for rank, y in enumerate(expected))
        reference = derivatives(expected[0], total, everyone)  # type: ignore[arg-type]
        x = inputs(f.size, *shape)[f.rank].requires_grad_()
        y = ours(f, x)
        assert torch.allclose(y, expected[f.rank], rtol=1e-12), name
        first, second = derivatives(y, loss_of(y, f.rank), [x])
        assert torch.allclose(first, reference[f.rank], rtol=1e-10), name
        assert torch.allclose(second, reference[f.size + f.rank], rtol=1e-10), name
        assert torch.equal(x.detach(), inputs(f.size, *shape)[f.rank]), "the argument was changed"
    assert len(events.events) == 2 * 4 * len(SUMMED), "each is waited for once, and twice backward"


def column_parallel(f: Functional, x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """This rank's columns of the product of all ranks' rows; its own rows need not come first."""
    gathering = f.start("all_gather", x)
    here = x @ columns
    gathered = gathering.wait()
    n = len(x)
    above, below = gathered[: n * f.rank], gathered[n * (f.rank + 1) :]
    return torch.cat([above @ columns, here, below @ columns]).tanh()


def an_overlapped_matmul() -> None:
    f, log, events = start()
    parts, (weight,) = inputs(f.size, 3, 8), inputs(1, 8, 4 * f.size)
    everyone = [x.clone().requires_grad_() for x in parts]
    whole = weight.clone().requires_grad_()
    loss_of((torch.cat(everyone) @ whole).tanh(), 0).backward()
    compiled = torch.compile(column_parallel, backend="aot_eager", fullgraph=True)
    places = torch.arange(12 * f.size**2, dtype=F64).view(3 * f.size, -1) / 7
    for run in (column_parallel, compiled):
        log.reset()
        events.events.clear()
        x = parts[f.rank].clone().requires_grad_()
        columns = weight.chunk(f.size, 1)[f.rank].clone().requires_grad_()
        columns.register_hook(lambda g: events.events.append("weight's gradient"))
        (places.chunk(f.size, 1)[f.rank] * run(f, x, columns).sin()).sum().backward()
        assert torch.allclose(x.grad, everyone[f.rank].grad, rtol=1e-10)
        assert torch.allclose(columns.grad, whole.grad.chunk(f.size, 1)[f.rank], rtol=1e-10)
        # forward gathers the rows of all ranks, and backward sums as many
        nbytes = 3 * f.size * 8 * 8
        assert log.total().payload_bytes == 2 * nbytes
        assert log.total().sent_bytes == 2 * nbytes * (f.size - 1) / f.size
        if run is column_parallel:
            backward = ["start reduce_scatter", "weight's gradient", "wait reduce_scatter"]
            assert events.events == ["start all_gather", "wait all_gather", *backward]


def two_experts() -> None:
    """Tokens go to the rank of the expert that a router picks, and come back in their places."""
    f, log, _ = start()
    tokens, experts = inputs(f.size, 7, 4), inputs(2 * f.size, 4, 4)
    routers = [(torch.arange(7) * 3 + r * 5) % (2 * f.size - 1) for r in range(f.size)]
    everyone = [x.clone().requires_grad_() for x in tokens]
    weights = [w.clone().requires_grad_() for w in experts]
    losses = []
    for r, (x, router) in enumerate(zip(everyone, routers, strict=True)):
        rows = [(row @ weights[e]).tanh() for row, e in zip(x, router.tolist(), strict=True)]
        losses.append(loss_of(torch.stack(rows), r))
    xs = [*everyone, *weights]
    firsts = torch.autograd.grad(sum(losses), xs, create_graph=True, allow_unused=True)
    total = sum((g**2).sum() for g in firsts if g is not None)
    seconds = torch.autograd.grad(total, xs, allow_unused=True)

    x = tokens[f.rank].clone().requires_grad_()
    own = [w.clone().requires_grad_() for w in experts[2 * f.rank : 2 * f.rank + 2]]
    router = routers[f.rank]
    order = router.argsort(stable=True)
    sent = torch.bincount(router, minlength=2 * f.size).view(f.size, 2)
    counts = f.counts(sent, len(x))
    assert counts.sent == sent.sum(1).tolist()
    theirs = [torch.bincount(r, minlength=2 * f.size).view(f.size, 2)[f.rank] for r in routers]
    assert torch.equal(counts.table, torch.stack(theirs))
    dispatched = f.exchange(x[order], counts.received, counts.sent)
    pieces = dispatched.split(counts.table.flatten().tolist())  # by rank, then by expert
    done = torch.cat([(piece @ own[n % 2]).tanh() for n, piece in enumerate(pieces)])
    combined = f.exchange(done, counts.sent, counts.received)[order.argsort()]
    assert torch.allclose(loss_of(combined, f.rank), losses[f.rank], rtol=1e-12)
    mine = [x, *own]
    first = torch.autograd.grad(loss_of(combined, f.rank), mine, create_graph=True)
    kept = log.total(Purpose.ACTIVATION)
    # forward moves the rows that leave this rank there and back, and so do their gradients
    there, back = 7 - counts.sent[f.rank], sum(counts.received) - counts.received[f.rank]
    assert kept.sent_bytes == 2 * (there + back) * 4 * 8
    assert log.total(Purpose.CONTROL).sent_bytes == (f.size - 1) * (2 + 1) * 8
    second = torch.autograd.grad(sum((g**2).sum() for g in first), mine)
    at = [f.rank, f.size + 2 * f.rank, f.size + 2 * f.rank + 1]
    for ours, reference in ((first, firsts), (second, seconds)):
        for got, position in zip(ours, at, strict=True):
            expected = reference[position]  # an expert that nobody picks has none
            expected = torch.zeros_like(got) if expected is None else expected
            assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(CommunicationError) as caught:
        call()
    return str(caught.value)


def mistakes() -> None:
    f, _, _ = start()
    counts = torch.ones(f.size, dtype=torch.long)
    wrong = torch.tensor([-1, 3]) if f.rank == 1 else counts  # which adds up
    message = refusal(lambda: f.counts(wrong, f.size))
    assert "control/test over 'data' are negative or do not add up" in message
    assert "at position 1" in message
    assert ("here 2 rows" in message) == (f.rank == 1)
    assert "at position 0, 1" in refusal(lambda: f.counts(counts, 5))
    assert "not whole numbers for 2 ranks" in refusal(lambda: f.counts(torch.ones(2), 2))
    assert "not whole numbers for 2 ranks" in refusal(lambda: f.counts(counts[:1], 1))
    started = f.start("all_reduce", torch.ones(3))
    assert torch.equal(started.wait(), torch.full((3,), 2.0))
    assert "waited for a second time" in refusal(started.wait)
    assert "reduce_scatter of activation/test" in refusal(
        lambda: f.start("reduce_scatter", torch.ones(3))
    )
    with pytest.raises(ValueError, match="no 'split' to start; choose from all_reduce"):
        f.start("split", torch.ones(2))


def replicated_pairs() -> None:
    f, _, _ = start()

    def mlp(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        y = f.start("reduce", (f.copy(x) @ first).tanh() @ second).wait()
        return f.start("gather", f.split(y.sin(), 1), 1).wait()

    x, first, second = (t.requires_grad_() for t in inputs(3, 4, 4))
    loss = loss_of(((x @ first).tanh() @ second).sin(), 0)
    loss.backward()
    for run in (mlp, torch.compile(mlp, backend="aot_eager", fullgraph=True)):
        mine = x.detach().requires_grad_()
        columns = first.detach().chunk(f.size, 1)[f.rank].requires_grad_()
        rows = second.detach().chunk(f.size, 0)[f.rank].requires_grad_()
        loss_of(run(mine, columns, rows), 0).backward()
        assert torch.allclose(mine.grad, x.grad, rtol=1e-10)
        assert torch.allclose(columns.grad, first.grad.chunk(f.size, 1)[f.rank], rtol=1e-10)
        assert torch.allclose(rows.grad, second.grad.chunk(f.size, 0)[f.rank], rtol=1e-10)


@pytest.mark.parametrize("world", WORLDS)
def test_started_collectives_have_the_derivatives_of_the_sum_of_losses(world: int) -> None:
    run_distributed(started_collectives, world)


@pytest.mark.parametrize("world", WORLDS)
def test_a_column_parallel_matmul_overlaps_both_ways(world: int) -> None:
    run_distributed(an_overlapped_matmul, world)


@pytest.mark.parametrize("world", WORLDS)
def test_experts_dispatch_and_combine_by_counts_of_the_device(world: int) -> None:
    run_distributed(two_experts, world)


def test_started_replicated_pairs_make_a_tensor_parallel_mlp() -> None:
    run_distributed(replicated_pairs, 2)


def test_wrong_counts_and_second_waits_are_named_on_every_rank() -> None:
    run_distributed(mistakes, 2)
