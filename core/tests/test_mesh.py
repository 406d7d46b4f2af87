"""Process groups of a mesh: right members, shared, lazily made, of the caller's own axes only."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from drivetrain.communication.mesh import Mesh
from drivetrain.contracts import Atom, SplitAxis
from drivetrain.errors import ConfigError
from drivetrain.plan.mesh_layout import MeshLayout
from drivetrain.testing import RanksFailedError, run_distributed


def start() -> int:
    dist.init_process_group("gloo")
    return dist.get_rank()


def mesh_of(*requests, **options) -> Mesh:
    return Mesh(MeshLayout.build(dist.get_world_size(), requests), dist.get_rank(), **options)


def groups_have_the_layouts_ranks() -> None:
    start()
    mesh = mesh_of(Atom("tp", 2), SplitAxis("ep", 2, within=("tp", "dp")))
    for axis in ("tp", "dp", "data", "world", "ep", ("dp", "tp")):
        assert tuple(dist.get_process_group_ranks(mesh.group(axis))) == mesh.ranks(axis), axis
        total = torch.tensor([dist.get_rank()])
        dist.all_reduce(total, group=mesh.group(axis))
        assert total.item() == sum(mesh.ranks(axis)), axis
    assert mesh.group("pp") is None
    assert mesh.group("world") is dist.group.WORLD
    assert mesh.group("edp") is mesh.group("dp"), "axes of equal ranks share a group"


def test_groups_have_the_layouts_ranks():
    run_distributed(groups_have_the_layouts_ranks, 4)


def ranks_with_different_numbers_of_groups_still_meet() -> None:
    rank = start()
    mesh = mesh_of(Atom("pp", 4))
    if rank in (0, 3):  # the tied embedding's group, which the middle stages know nothing of
        dist.all_reduce(torch.zeros(1), group=mesh.group(mesh.subgroup("pp", (0, 3))))
    if rank < 2:
        dist.all_reduce(torch.zeros(1), group=mesh.group(mesh.subgroup("pp", (0, 1))))
    dist.all_reduce(torch.zeros(1), group=mesh.group(mesh.subgroup("pp", (0, 1, 2, 3))))
    if rank > 0:
        dist.all_reduce(torch.zeros(1), group=mesh.group(mesh.subgroup("pp", (1, 2, 3))))


def test_ranks_with_different_numbers_of_groups_still_meet():
    run_distributed(ranks_with_different_numbers_of_groups_still_meet, 4)


def equal_meshes_share_groups_until_the_last_closes() -> None:
    start()
    one, other = mesh_of(Atom("tp", 2)), mesh_of(Atom("tp", 2))
    group = one.group("tp")
    assert other.group("tp") is group
    one.close()
    one.close()
    assert group in distributed_c10d._world.pg_map
    dist.all_reduce(torch.zeros(1), group=other.group("tp"))
    other.close()
    assert group not in distributed_c10d._world.pg_map, "the last mesh destroys the group"
    again = mesh_of(Atom("tp", 2))
    assert again.group("tp") is not group
    dist.all_reduce(torch.zeros(1), group=again.group("tp"))


def test_equal_meshes_share_groups_until_the_last_closes():
    run_distributed(equal_meshes_share_groups_until_the_last_closes, 4)


def exports_a_device_mesh() -> None:
    rank = start()
    mesh = mesh_of(Atom("pp", 1), Atom("tp", 2))
    exported = mesh.device_mesh("pp", "dp", "tp")
    assert exported.mesh.tolist() == [[[0, 1], [2, 3]]]
    assert exported.mesh_dim_names == ("pp", "dp", "tp")
    assert list(exported.get_coordinate()) == [0, rank // 2, rank % 2]
    assert exported.get_group("tp") is mesh.group("tp")
    flat = mesh.device_mesh("tp")
    assert flat.mesh.tolist() == list(mesh.ranks("tp"))
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    whole = torch.arange(8.0).view(4, 2)
    tensor = distribute_tensor(whole, exported["dp", "tp"], [Replicate(), Shard(0)])
    assert torch.equal(tensor.to_local(), whole[2 * (rank % 2) : 2 * (rank % 2) + 2])


def test_exports_a_device_mesh():
    run_distributed(exports_a_device_mesh, 4)


class Mpu:
    """What Megatron offers: tensor-parallel neighbours, data parallelism across them."""

    def __init__(self, tensor: list[list[int]], data: list[list[int]]) -> None:
        rank = dist.get_rank()
        made = {
            kind: [dist.new_group(g) for g in kinds]
            for kind, kinds in (("tensor", tensor), ("data", data))
        }
        self.tensor = made["tensor"][next(i for i, g in enumerate(tensor) if rank in g)]
        self.data = made["data"][next(i for i, g in enumerate(data) if rank in g)]

    def get_model_parallel_group(self):
        return self.tensor

    def get_model_parallel_world_size(self):
        return dist.get_world_size(self.tensor)

    def get_data_parallel_group(self):
        return self.data

    def get_data_parallel_world_size(self):
        return dist.get_world_size(self.data)


def an_mpus_groups_are_used() -> None:
    start()
    mpu = Mpu([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    mesh = Mesh.from_mpu(mpu)
    assert mesh.size("tp") == 2
    assert mesh.size("dp") == 2
    assert mesh.group("tp") is mpu.tensor
    assert mesh.group("data") is mpu.data
    mesh.close()
    dist.all_reduce(torch.zeros(1), group=mpu.tensor)  # not ours, so not destroyed
    wider = MeshLayout.build(4, [Atom("tp", 4)])
    with pytest.raises(ConfigError, match=r"mpu's tp group of rank \d is .* but this job"):
        Mesh.from_mpu(mpu, wider)
    with pytest.raises(ConfigError, match="lays out"):
        Mesh.from_mpu(Mpu([[0, 2], [1, 3]], [[0, 1], [2, 3]]))


def test_an_mpus_groups_are_used():
    run_distributed(an_mpus_groups_are_used, 4)


def fake_world(rank: int, world: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)


def one_of_a_thousand_ranks() -> int:
    fake_world(777, 1000)
    mesh = mesh_of(Atom("pp", 5), Atom("tp", 8), SplitAxis("ep", 5))
    for axis in ("pp", "dp", "tp", "data", "ep", "edp", "world"):
        assert dist.get_world_size(mesh.group(axis)) == mesh.size(axis)
    return distributed_c10d.get_pg_count()


def test_one_of_a_thousand_ranks_makes_only_its_own_groups():
    # world, pp, dp (= data), tp, ep, edp; the tp groups of all ranks alone would be 125
    (count,) = run_distributed(one_of_a_thousand_ranks, 1)
    assert count <= 6


def a_mesh_without_torch_distributed() -> None:
    Mesh(MeshLayout.build(4), 0).group("data")


def test_a_mesh_of_several_ranks_needs_torch_distributed():
    assert Mesh(MeshLayout.build(1), 0).group("data") is None
    with pytest.raises(RanksFailedError, match="ConfigError: a mesh of several ranks needs"):
        run_distributed(a_mesh_without_torch_distributed, 1)
