"""Byte counts against hand-computed numbers."""

from __future__ import annotations

import torch

from drivetrain.communication.byte_log import ByteLog
from drivetrain.communication.mesh import Mesh
from drivetrain.communication.torch_communicator import TorchCommunicator
from drivetrain.contracts import Atom, Purpose, Tag
from drivetrain.plan.mesh_layout import MeshLayout
from drivetrain.testing import run_distributed

META = torch.device("meta")


def log(world: int = 8, rank: int = 0) -> ByteLog:
    layout = MeshLayout.build(world, [Atom("tp", 2)])
    return ByteLog(TorchCommunicator(Mesh(layout, rank), META))


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def test_ring_formulas_over_four_ranks():
    c, tag = log(), Tag(Purpose.GRADIENT, "b0")
    c.all_reduce(tensor(100), "data", tag)  # 400 bytes: 2 * 400 * 3/4
    c.reduce_scatter(tensor(25), tensor(100), "data", tag)  # 400 * 3/4
    c.all_gather(tensor(100, dtype=torch.bfloat16), tensor(25, dtype=torch.bfloat16), "data", tag)
    c.broadcast(tensor(100), "data", tag)
    c.all_to_all(tensor(8, 2), tensor(8, 2), "data", tag)  # 64 bytes, a quarter is kept
    c.send_receive(
        [(tensor(10), 1), (tensor(2, dtype=torch.float64), 1)], [(tensor(5), 1)], "tp", tag
    )
    c.barrier("data", tag)
    counts = {call.op: (t.calls, t.payload_bytes, t.sent_bytes) for call, t in c.items()}
    assert counts == {
        "all_reduce": (1, 400, 600),
        "reduce_scatter": (1, 400, 300),
        "all_gather": (1, 200, 150),
        "broadcast": (1, 400, 300),
        "all_to_all": (1, 64, 48),
        "send_receive": (1, 40 + 16 + 20, 40 + 16),
        "barrier": (1, 0, 0),
    }


def test_uneven_exchanges_count_what_is_not_kept():
    c = log(rank=2)  # position 1 of the data axis 0, 2, 4, 6
    splits = [1, 5, 2, 0]
    c.all_to_all(
        tensor(8), tensor(8), "data", Tag(Purpose.ACTIVATION),
        output_splits=splits, input_splits=splits,
    )  # fmt: skip
    assert c.total().sent_bytes == (8 - 5) * 4


def test_one_rank_sends_nothing():
    c = log(world=2)
    c.all_reduce(tensor(100), "data", Tag(Purpose.GRADIENT))
    assert c.total().payload_bytes == 400
    assert c.total().sent_bytes == 0


def test_totals_select_by_purpose_axis_op_and_key():
    c = log()
    for key in ("b0", "b1"):
        c.all_reduce(tensor(10), "data", Tag(Purpose.GRADIENT, key))
    c.all_reduce(tensor(10), "tp", Tag(Purpose.ACTIVATION, "b0"))
    c.broadcast(tensor(10), "data", Tag(Purpose.WEIGHT, "b0", site="start"))
    assert c.total().calls == 4
    assert c.total(purpose=Purpose.GRADIENT).calls == 2
    assert c.total(axis="tp").payload_bytes == 40
    assert c.total(op="all_reduce", key="b0").calls == 2
    assert c.total(Purpose.GRADIENT, "data", "all_reduce", "b1").calls == 1
    c.reset()
    assert c.total().calls == 0
    assert list(c.items()) == []


def a_logged_sum() -> tuple[float, int]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    mesh = Mesh(MeshLayout.build(2), dist.get_rank())
    c = ByteLog(TorchCommunicator(mesh, torch.device("cpu")))
    x = torch.ones(3)
    c.all_reduce(x, "data", Tag(Purpose.GRADIENT), asynchronous=True).wait()
    return x.sum().item(), c.total().payload_bytes


def test_the_log_changes_nothing():
    assert run_distributed(a_logged_sum, 2) == [(6.0, 12)] * 2
