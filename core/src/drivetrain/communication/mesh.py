"""The axes of a job as torch process groups, which are created when they are first used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh

from drivetrain.contracts.world.axis import Atom, Axis, SubAxis
from drivetrain.errors import ConfigError
from drivetrain.plan.mesh_layout import MeshLayout

# How an mpu calls each axis, in the order in which names are tried.
_MPU_NAMES = {
    "tp": ("tensor_model_parallel", "slice_parallel", "model_parallel"),
    "pp": ("pipeline_model_parallel", "pipe_parallel", "pipeline_parallel"),
    "sp": ("sequence_parallel",),
    "dp": ("data_parallel",),
    "data": ("sequence_data_parallel",),
}


@dataclass
class _Shared:
    """A process group and the number of meshes that use it; ``None`` once it is destroyed."""

    group: dist.ProcessGroup | None = None
    users: int = 0
    created: int = 0
    imported: bool = False


# Groups by backend, where it is not that of the default group, and ranks, for as long as the
# default group lives that they were made from. Equal meshes of one process share them.
_Members = tuple[str | None, tuple[int, ...]]
_groups: WeakKeyDictionary[dist.ProcessGroup, dict[_Members, _Shared]] = WeakKeyDictionary()


class Mesh:
    """This rank's view of a :class:`MeshLayout`.

    Only groups that this rank belongs to are ever created, each at the first use of its axis; all
    ranks of the group must come to that point.

    Args:
        layout: the arithmetic.
        rank: this process.
        device_type: torch's type of the device that :meth:`device_mesh` is for.
        timeout: of collectives in the groups created here; torch's default when not given.
        meet: called as ``meet(name, ranks)`` before a group is created, to wait for the others.
        backend: of groups created here; by default that of the default group.
    """

    def __init__(
        self,
        layout: MeshLayout,
        rank: int,
        *,
        device_type: str = "cpu",
        timeout: timedelta | None = None,
        meet: Callable[[str, int], None] | None = None,
        backend: str | None = None,
    ) -> None:
        self.layout = layout
        self.rank = rank
        self._device_type = device_type
        self._timeout = timeout
        self._meet = meet
        self._backend = backend
        self._used: dict[tuple[int, ...], _Shared] = {}

    def size(self, axis: Axis) -> int:
        """Number of ranks along ``axis``."""
        return self.layout.size(axis)

    def coordinate(self, axis: Axis) -> int:
        """This rank's position along ``axis``."""
        return self.layout.coordinate(self.rank, axis)

    def ranks(self, axis: Axis) -> tuple[int, ...]:
        """The ranks along ``axis`` through this one, in order of position."""
        return self.layout.group(self.rank, axis)

    def subgroup(self, axis: str | tuple[str, ...], positions: Sequence[int]) -> SubAxis:
        """Some positions of ``axis``, usable wherever an axis is: ``subgroup("pp", (0, 3))``.

        Raises:
            ConfigError: a position is out of range or repeats.
        """
        return self.layout.sub_axis(axis, positions)

    def group(self, axis: Axis) -> dist.ProcessGroup | None:
        """The process group of ``axis`` through this rank; ``None`` when it has one rank only.

        Collective over the axis at its first use.
        """
        ranks = self.ranks(axis)
        return None if len(ranks) == 1 else self._group(ranks)

    def device_mesh(self, *axes: str) -> DeviceMesh:
        """A torch ``DeviceMesh`` of this rank's slice of the world, one dimension per axis.

        Collective over each of the axes at their first use.
        """
        ranks = self.layout.group(self.rank, axes)
        grid = torch.empty([self.size(axis) for axis in axes], dtype=torch.int)
        for rank in ranks:
            grid[tuple(self.layout.coordinate(rank, axis) for axis in axes)] = rank
        groups = [self._group(self.ranks(axis)) for axis in axes]
        if len(axes) == 1:
            return DeviceMesh.from_group(groups[0], self._device_type, mesh_dim_names=axes)
        return DeviceMesh.from_group(groups, self._device_type, mesh=grid, mesh_dim_names=axes)

    @classmethod
    def from_mpu(cls, mpu: Any, layout: MeshLayout | None = None, **options: Any) -> Mesh:
        """Take over the groups of a model-parallel-unit object, as Megatron's.

        Args:
            mpu: has methods ``get_<axis>_{world_size, group}`` for some of tensor (model) parallel,
                pipeline, sequence and data parallel.
            layout: axes that the groups must agree with; by default they are read from the groups.
            options: passed on to the constructor.

        Raises:
            ConfigError: a group's ranks are not those of the layout; names both.
        """
        groups = _mpu_groups(mpu)
        if layout is None:
            atoms = [
                Atom(axis, len(groups[axis][0]), "mpu")
                for axis in ("pp", "sp", "tp")
                if axis in groups
            ]
            layout = MeshLayout.build(dist.get_world_size(), atoms)
        mesh = cls(layout, dist.get_rank(), **options)
        for axis, (ranks, group) in groups.items():
            if ranks != mesh.ranks(axis):
                raise ConfigError(
                    f"the mpu's {axis} group of rank {mesh.rank} is {list(ranks)}, but this job "
                    f"lays out {list(mesh.ranks(axis))}; atoms nest as pp, dp, sp, tp"
                )
            if len(ranks) > 1:
                shared = _world_groups().setdefault((None, ranks), _Shared(group, imported=True))
                shared.users += 1
                mesh._used[ranks] = shared
        return mesh

    def close(self) -> None:
        """Let go of all groups; those that no other mesh uses are destroyed."""
        while self._used:
            _, shared = self._used.popitem()
            shared.users -= 1
            group, shared.group = shared.group, None if shared.users == 0 else shared.group
            if shared.users == 0 and not shared.imported and _is_alive(group):
                dist.destroy_process_group(group)

    def _group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        used = self._used.get(ranks)
        if used is None:
            used = _world_groups().setdefault((self._backend, ranks), _Shared())
            if used.group is None:
                used.group = self._create(ranks, used.created)
                used.created += 1
            used.users += 1
            self._used[ranks] = used
        assert used.group is not None
        return used.group

    def _create(self, ranks: tuple[int, ...], generation: int) -> dist.ProcessGroup:
        default = _default_group()
        if self._backend is None and len(ranks) == dist.get_world_size():
            return default
        # ``new_group(use_local_synchronization=True)`` derives the group's name from how many
        # groups *this* rank has, so ranks with different numbers of groups would wait for each
        # other for ever. The name must depend on the members alone.
        digest = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
        name = f"drivetrain/{self._backend or ''}{digest}/{generation}"
        backend, store = c10d._world.pg_map[default]
        backend = self._backend or backend
        timeout = self._timeout or c10d._get_default_timeout(c10d.Backend(backend))
        if self._meet is not None and len(ranks) > 1:
            self._meet(name, len(ranks))
        group: dist.ProcessGroup
        group, _ = c10d._new_process_group_helper(
            len(ranks),
            ranks.index(self.rank),
            list(ranks),
            backend,
            store,
            c10d.GroupName(name),
            timeout=timeout,
            group_desc=name,
        )
        c10d._world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(ranks)}
        return group


def _default_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    if group is None:
        raise ConfigError("a mesh of several ranks needs torch.distributed to be initialized")
    return group


def _world_groups() -> dict[_Members, _Shared]:
    return _groups.setdefault(_default_group(), {})


def _is_alive(group: dist.ProcessGroup | None) -> bool:
    return dist.is_initialized() and group in c10d._world.pg_map and group is not dist.group.WORLD


def _mpu_groups(mpu: Any) -> dict[str, tuple[tuple[int, ...], dist.ProcessGroup]]:
    """Axis -> (ranks, group) of everything that ``mpu`` offers."""
    found: dict[str, tuple[tuple[int, ...], dist.ProcessGroup]] = {}
    for axis, names in _MPU_NAMES.items():
        for name in names:
            get = getattr(mpu, f"get_{name}_group", None)
            if get is not None:
                group = get()
                found[axis] = (tuple(dist.get_process_group_ranks(group)), group)
                break
    # Sequence-parallel mpus answer for "model parallel" with their sequence groups.
    if "sp" in found and found.get("tp", ((), None))[0] == found["sp"][0]:
        del found["tp"]
    return found
