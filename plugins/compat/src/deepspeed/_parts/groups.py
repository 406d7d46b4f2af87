"""``deepspeed.utils.groups``: the process groups of the job that was opened last.

Before there is a job, data-parallel ranks are all ranks.
"""

from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

import torch.distributed as dist

from deepspeed._parts.comm import get_rank, get_world_group, get_world_size
from drivetrain.contracts import Axis
from drivetrain.job.job import Job, open_jobs

_own: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()
"""World group -> the group of this rank alone."""


def _job() -> Job | None:
    jobs = open_jobs()
    return jobs[-1] if jobs else None


def _group(axis: str) -> dist.ProcessGroup | None:
    job = _job()
    if job is None:
        return dist.group.WORLD if axis in ("dp", "data") else _alone()
    return group_of(job, axis)


def group_of(job: Job, axis: Axis) -> dist.ProcessGroup | None:
    """The process group of an axis; ``None`` only where there is no ``torch.distributed``.

    Collective over the axis at its first use.
    """
    if job.mesh.size(axis) == job.world_size:
        return dist.group.WORLD
    # `None` would mean all ranks to torch.distributed, so a group of one rank is a group, too.
    return job.mesh.group(axis) or _alone()


def _alone() -> dist.ProcessGroup | None:
    world = dist.group.WORLD
    if world is None or dist.get_world_size() == 1:
        return world
    if world not in _own:
        group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        assert group is not None
        _own[world] = group
    return _own[world]


def _size(axis: str) -> int:
    job = _job()
    if job is None:
        return get_world_size() if axis in ("dp", "data") else 1
    return job.mesh.size(axis)


def _rank(axis: str) -> int:
    job = _job()
    if job is None:
        return get_rank() if axis in ("dp", "data") else 0
    return job.mesh.coordinate(axis)


get_data_parallel_group = partial(_group, "dp")
get_data_parallel_rank = partial(_rank, "dp")
get_data_parallel_world_size = partial(_size, "dp")
get_sequence_data_parallel_group = partial(_group, "data")
get_sequence_data_parallel_rank = partial(_rank, "data")
get_sequence_data_parallel_world_size = partial(_size, "data")
get_sequence_parallel_group = partial(_group, "sp")
get_sequence_parallel_rank = partial(_rank, "sp")
get_sequence_parallel_world_size = partial(_size, "sp")
get_tensor_model_parallel_group = get_model_parallel_group = partial(_group, "tp")
get_tensor_model_parallel_rank = get_model_parallel_rank = partial(_rank, "tp")
get_tensor_model_parallel_world_size = get_model_parallel_world_size = partial(_size, "tp")
get_world_rank = get_rank

__all__ = ["get_world_group", "get_world_rank", "get_world_size"]
