"""Every collective, dtype and world size against sums that each rank works out for itself."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.distributed as dist

from drivetrain.communication.byte_log import ByteLog
from drivetrain.communication.mesh import Mesh
from drivetrain.communication.torch_communicator import TorchCommunicator
from drivetrain.contracts import (
    DONE,
    Atom,
    Collective,
    CommunicatorWrapper,
    Handle,
    Kind,
    Op,
    Purpose,
    Tag,
)
from drivetrain.errors import CommunicationError
from drivetrain.plan.mesh_layout import MeshLayout
from drivetrain.testing import run_distributed

TAG = Tag(Purpose.GRADIENT, "bucket0", "backward")
NUMBERS = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
)
BYTES = (*NUMBERS, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
WORLDS = (1, 2, 3, 4)


def start(*requests) -> TorchCommunicator:
    rank, world = 0, 1
    # A rank alone has no process group, as in a job.
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    return TorchCommunicator(Mesh(MeshLayout.build(world, requests), rank), torch.device("cpu"))


def piece(rank: int, dtype: torch.dtype, numel: int = 6) -> torch.Tensor:
    """Small whole numbers, exact in every dtype and in every sum of them."""
    return ((torch.arange(numel) + 3 * rank) % 5).to(torch.float32).to(dtype)


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.float(), other.float())


def reductions() -> None:
    c = start()
    size, rank = c.size("data"), c.rank("data")
    for dtype in NUMBERS:
        everyone = torch.stack([piece(r, dtype, 4 * size) for r in range(size)]).double()
        for op, expected in (
            (Op.SUM, everyone.sum(0)),
            (Op.MAX, everyone.amax(0)),
            (Op.MIN, everyone.amin(0)),
        ):
            for asynchronous in (False, True):
                x = piece(rank, dtype, 4 * size)
                handle = c.all_reduce(x, "data", TAG, op=op, asynchronous=asynchronous)
                handle.wait()
                handle.wait()
                assert equal(x, expected.to(dtype)), (dtype, op)
                x = piece(rank, dtype, 4 * size)
                out = torch.empty(4, dtype=dtype)
                c.reduce_scatter(out, x, "data", TAG, op=op, asynchronous=asynchronous).wait()
                assert equal(out, expected.to(dtype)[4 * rank : 4 * rank + 4]), (dtype, op)
                assert equal(x, piece(rank, dtype, 4 * size)), "the input was changed"
                part = x[4 * rank : 4 * rank + 4]
                c.reduce_scatter(part, x, "data", TAG, op=op, asynchronous=asynchronous).wait()
                assert equal(part, expected.to(dtype)[4 * rank : 4 * rank + 4]), "in place"


@pytest.mark.parametrize("world", WORLDS)
def test_reductions_are_those_of_all_ranks(world):
    run_distributed(reductions, world)


def movements() -> None:
    c = start()
    size, rank = c.size("data"), c.rank("data")
    for dtype in BYTES:
        for asynchronous in (False, True):
            how = {"asynchronous": asynchronous}
            pieces = [piece(r, dtype) for r in range(size)]
            gathered = torch.zeros(6 * size).to(dtype)
            c.all_gather(gathered, pieces[rank], "data", TAG, **how).wait()
            expected = torch.cat([p.float() for p in pieces]).to(dtype)
            assert equal(gathered, expected), dtype
            inside = torch.zeros(6 * size).to(dtype)
            part = inside[6 * rank : 6 * rank + 6]
            part.copy_(pieces[rank])
            c.all_gather(inside, part, "data", TAG, **how).wait()
            assert equal(inside, expected), "in place"
            for source in range(size):
                x = pieces[rank].clone()
                c.broadcast(x, "data", TAG, source=source, **how).wait()
                assert equal(x, pieces[source]), dtype
            x = torch.stack([piece(10 * rank + r, dtype) for r in range(size)])
            out = torch.zeros(size, 6).to(dtype)
            c.all_to_all(out, x, "data", TAG, **how).wait()
            assert equal(out, torch.stack([piece(10 * r + rank, dtype) for r in range(size)]))
            # r sends r + to + 1 rows to each rank "to", so what comes is as uneven
            rows = [rank + to + 1 for to in range(size)]
            x = piece(rank, dtype, 2 * sum(rows)).view(-1, 2)
            out = torch.zeros(sum(rows), 2).to(dtype)
            c.all_to_all(out, x, "data", TAG, output_splits=rows, input_splits=rows, **how).wait()
            came = []
            for r in range(size):
                theirs = [r + to + 1 for to in range(size)]
                whole = piece(r, dtype, 2 * sum(theirs)).view(-1, 2).float()
                came.append(whole.split(theirs)[rank])
            assert equal(out, torch.cat(came).to(dtype)), dtype
            if size > 1:
                out = torch.zeros(6).to(dtype)
                handles = [
                    c.send(pieces[rank], "data", TAG, to=(rank + 1) % size, asynchronous=True),
                    c.receive(out, "data", TAG, source=(rank - 1) % size, **how),
                ]
                for handle in handles:
                    handle.wait()
                assert equal(out, pieces[(rank - 1) % size])
    c.barrier("data", TAG)
    assert equal(c.buffer(5, torch.bfloat16, "data"), torch.zeros(5, dtype=torch.bfloat16))


@pytest.mark.parametrize("world", WORLDS)
def test_movements_bring_everything_where_it_belongs(world):
    run_distributed(movements, world)


def repeated_waits() -> None:
    c = start()
    out = torch.empty(4)
    handle = c.reduce_scatter(out, torch.ones(8), "data", TAG, asynchronous=True)
    handle.wait()
    out.zero_()  # the result has been used up
    handle.wait()
    assert torch.equal(out, torch.zeros(4))


def test_a_handle_delivers_once_however_often_it_is_waited_for():
    run_distributed(repeated_waits, 2)


def low_precision_sums() -> None:
    c = start()
    size, rank = c.size("data"), c.rank("data")
    torch.manual_seed(5)
    everyone = torch.randn(size, 64 * size).to(torch.bfloat16)
    out = torch.empty(64, dtype=torch.bfloat16)
    c.reduce_scatter(out, everyone[rank].clone(), "data", TAG)
    mine = everyone[:, 64 * rank : 64 * rank + 64]
    assert torch.equal(out, mine.float().sum(0).to(torch.bfloat16))


def test_bf16_reduce_scatter_is_rounded_once():
    run_distributed(low_precision_sums, 4)


def axes() -> None:
    c = start(Atom("tp", 2))
    rank = dist.get_rank()
    for axis, ranks in {
        "tp": [rank // 2 * 2, rank // 2 * 2 + 1],
        "data": [rank % 2, rank % 2 + 2],
        ("data", "tp"): [0, 1, 2, 3],
        "pp": [rank],
    }.items():
        x = torch.tensor([float(rank)])
        c.all_reduce(x, axis, TAG)
        assert x.item() == sum(ranks), axis
        assert c.size(axis) == len(ranks)
        assert c.rank(axis) == ranks.index(rank)
    ends = Mesh(MeshLayout.build(4, [Atom("pp", 4)]), rank).subgroup("pp", (0, 3))
    pipeline = start_again([Atom("pp", 4)])
    if rank in (0, 3):
        x = torch.tensor([float(rank + 1)])
        pipeline.all_reduce(x, ends, TAG)
        assert x.item() == 5


def start_again(requests) -> TorchCommunicator:
    layout = MeshLayout.build(dist.get_world_size(), requests)
    return TorchCommunicator(Mesh(layout, dist.get_rank()), torch.device("cpu"))


def test_axes_sets_of_axes_and_parts_of_axes():
    run_distributed(axes, 4)


def refusal(call) -> str:
    with pytest.raises(CommunicationError) as caught:
        call()
    return str(caught.value)


def mistakes() -> None:
    c = start()
    x = torch.zeros
    where = "gradient/bucket0/backward over 'data' (2 ranks): "
    for call, message in (
        (
            lambda: c.all_gather(x(3, 5), x(4), "data", TAG),
            f"all_gather of {where}shapes (3, 5) and (4,) do not fit: expected 2 ranks x 4 = 8",
        ),
        (
            lambda: c.reduce_scatter(x(3), x(8), "data", TAG),
            f"reduce_scatter of {where}shapes (8,) and (3,) do not fit: expected 2 ranks x 3 = 6",
        ),
        (
            lambda: c.all_gather(x(8), x(4, dtype=torch.int32), "data", TAG),
            f"all_gather of {where}input is torch.int32 on cpu, output is torch.float32 on cpu",
        ),
        (
            lambda: c.all_reduce(x(4, 4).t()[1:], "data", TAG),
            f"all_reduce of {where}tensor of shape (3, 4), stride (1, 4) is not contiguous",
        ),
        (
            lambda: c.all_reduce(x(4).to(torch.float8_e5m2), "data", TAG),
            f"all_reduce of {where}torch.float8_e5m2 cannot be reduced; cast it to bfloat16",
        ),
        (
            lambda: c.all_to_all(x(3, 2), x(3, 2), "data", TAG),
            f"all_to_all of {where}input of shape (3, 2) has no 2 equal slices",
        ),
        (
            lambda: c.all_to_all(x(4), x(4), "data", TAG, input_splits=[1, 2]),
            f"all_to_all of {where}input of shape (4,) cannot be cut into [1, 2]",
        ),
        (
            lambda: c.broadcast(x(4), "data", TAG, source=2),
            f"broadcast of {where}there is no position 2 among 2 ranks",
        ),
        (
            lambda: c.send(x(4), "data", TAG, to=c.rank("data")),
            f"send_receive of {where}position {c.rank('data')} is this rank itself",
        ),
        (
            lambda: c.send_receive([(x(4), 1 - c.rank("data"))], [(x(4), 2)], "data", TAG),
            f"send_receive of {where}there is no position 2 among 2 ranks",
        ),
        (
            lambda: c.receive(x(4, 4).t(), "data", TAG, source=1 - c.rank("data")),
            f"send_receive of {where}tensor of shape (4, 4), stride (1, 4) is not contiguous",
        ),
    ):
        assert message in refusal(call)


def test_errors_name_collective_tag_axis_and_shapes():
    run_distributed(mistakes, 2)


def a_thousand_ranks_on_meta() -> None:
    layout = MeshLayout.build(1000, [Atom("tp", 8), Atom("pp", 5)])
    c = TorchCommunicator(Mesh(layout, 777), torch.device("meta"))
    x = torch.empty(25 * 4, device="meta")
    c.all_reduce(x, "data", TAG, asynchronous=True).wait()
    c.reduce_scatter(torch.empty(4, device="meta"), x, "data", TAG)
    c.all_gather(x, torch.empty(4, device="meta"), "data", TAG)
    c.all_to_all(x, x, "data", TAG)
    c.send(x, "pp", TAG, to=1)
    c.barrier("world", TAG)
    assert c.buffer(10**12, torch.bfloat16, "data").is_meta
    assert "expected 25 ranks x 5 = 125" in refusal(
        lambda: c.all_gather(x, torch.empty(5, device="meta"), "data", TAG)
    )
    assert not dist.is_initialized()


def test_a_thousand_ranks_can_be_walked_through_on_meta():
    run_distributed(a_thousand_ranks_on_meta, 1)


def a_thousand_fake_ranks() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=777, world_size=1000)
    c = start_again([Atom("tp", 8), Atom("pp", 5)])
    x = torch.zeros(25 * 4)
    c.all_reduce(x, "data", TAG)
    c.reduce_scatter(torch.zeros(4), x, "data", TAG)
    c.all_gather(x, torch.zeros(4), "data", TAG, asynchronous=True).wait()
    c.all_to_all(x, x.clone(), "data", TAG)
    c.broadcast(x, "tp", TAG, source=3)
    c.barrier("world", TAG)


def test_fake_process_groups_of_a_thousand_ranks_work():
    run_distributed(a_thousand_fake_ranks, 1)


def no_warnings() -> None:
    c = start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c.all_gather(torch.zeros(8), torch.zeros(4), "data", TAG)
        c.reduce_scatter(torch.zeros(4), torch.zeros(8), "data", TAG)


def test_collectives_do_not_warn():
    run_distributed(no_warnings, 2)


class Quantised(CommunicatorWrapper):
    """Gathers weights as int8 and a scale per rank: two collectives in the place of one."""

    def run(self, collective: Collective) -> Handle:
        if collective.kind is not Kind.ALL_GATHER or collective.tag.purpose is not Purpose.WEIGHT:
            return self.inner.run(collective)
        size, axis, tag = self.size(collective.axis), collective.axis, collective.tag
        scale = collective.input.abs().max().view(1) / 127
        scales = torch.empty(size)
        self.inner.all_gather(scales, scale, axis, tag)
        numbers = torch.empty(collective.output.numel(), dtype=torch.int8)
        own = (collective.input / scale).round().to(torch.int8)
        self.inner.all_gather(numbers, own, axis, tag)
        collective.output.copy_((numbers.view(size, -1) * scales[:, None]).view(-1))
        return DONE


def quantised_weights() -> None:
    log = ByteLog(start())
    c, rank = Quantised(log), log.rank("data")
    weights = torch.tensor([[127.0, -64.0, 3.0], [254.0, 20.0, 0.0]])
    gathered = torch.empty(6)
    c.all_gather(gathered, weights[rank], "data", Tag(Purpose.WEIGHT, "bucket0"))
    assert torch.equal(gathered, weights.view(-1))
    # 2 scales of 4 bytes and 6 bytes of numbers, of which each rank sends its own half
    assert log.total(Purpose.WEIGHT).calls == 2
    assert log.total(Purpose.WEIGHT).sent_bytes == 4 + 3
    state = torch.empty(6)
    c.all_gather(state, weights[rank], "data", Tag(Purpose.STATE, "bucket0"))
    assert log.total(Purpose.STATE).sent_bytes == 12


def test_a_decorator_may_run_several_collectives_in_the_place_of_one():
    run_distributed(quantised_weights, 2)
