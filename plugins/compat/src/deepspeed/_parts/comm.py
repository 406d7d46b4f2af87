"""What ``deepspeed.comm`` has beyond functions of ``torch.distributed``, which it shows as well."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from drivetrain.communication.process_group import Ranks
from drivetrain.job.job import init_distributed as start

logger = logging.getLogger("deepspeed")


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any | None = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Start ``torch.distributed``, if it is not started; see :func:`drivetrain.init_distributed`.

    Args:
        dist_backend: torch's backend string; by default that of the device.
        auto_mpi_discovery: take rank and size from Open MPI's or Intel MPI's environment.
        distributed_port: where ``MASTER_PORT`` is not set.
        verbose: accepted, has no effect: it is logged at level INFO.
        timeout: of collectives.
        init_method: rendezvous URL; by default torchrun's environment.
        dist_init_required: ``False`` starts nothing.
        config: accepted, has no effect: the engine's config decides.
        rank: this process, where ``init_method`` does not say.
        world_size: number of ranks, where ``init_method`` does not say.

    Raises:
        ConfigError: the environment is incomplete.
        CommunicationError: the ranks did not come together.
    """
    if dist_init_required is False or dist.is_initialized():
        return
    if auto_mpi_discovery and "RANK" not in os.environ:
        _from_mpi()
    os.environ.setdefault("MASTER_PORT", str(distributed_port))
    start(dist_backend, timeout=timeout, init_method=init_method, rank=rank, world_size=world_size)
    logger.info("torch.distributed runs over %s", dist.get_backend())


_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
"""Rank, size and local rank, as Open MPI, and as MPICH and Intel MPI name them."""


def _from_mpi() -> None:
    for names in _MPI:
        if names[0] in os.environ and names[1] in os.environ:
            for variable, name in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), names, strict=True):
                if name in os.environ:
                    os.environ[variable] = os.environ[name]
            if os.environ["WORLD_SIZE"] == os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"):
                os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            return


def get_rank(group: dist.ProcessGroup | None = None) -> int:
    """This process in a group; of the launcher's environment before there is a group."""
    return dist.get_rank(group) if dist.is_initialized() else Ranks.current().rank


def get_world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks of a group; of the launcher's environment before there is a group."""
    return dist.get_world_size(group) if dist.is_initialized() else Ranks.current().world_size


def get_local_rank() -> int:
    """This process among those of its host."""
    return Ranks.current().local_rank


def get_world_group() -> dist.ProcessGroup | None:
    """The group of all ranks."""
    return dist.group.WORLD


def get_global_rank(group: dist.ProcessGroup | None = None, group_rank: int = 0) -> int:
    """The rank of all that has a place in a group."""
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def get_all_ranks_from_group(group: dist.ProcessGroup | None = None) -> list[int]:
    """The ranks of a group, as ranks of all."""
    return dist.get_process_group_ranks(group)


def inference_all_reduce(
    tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None
) -> Any:
    """Reduce a tensor over a group, in place."""
    return dist.all_reduce(tensor, op, group)


def reduce_scatter_fn(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
    **_: Any,
) -> Any:
    """Sum a tensor over a group and keep this rank's part; see ``reduce_scatter_tensor``."""
    return dist.reduce_scatter_tensor(output_tensor, tensor, op, group, async_op)


def allgather_fn(
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
    **_: Any,
) -> Any:
    """Gather the parts of a group; see ``all_gather_into_tensor``."""
    return dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)


class _Several:
    """What is waited for when several collectives are under way."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def wait(self) -> None:
        """Wait for all of them."""
        for handle in self._handles:
            handle.wait()


def all_reduce_coalesced(
    tensors: list[torch.Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """Reduce several tensors over a group, in place."""
    return _together([dist.all_reduce(t, op, group, async_op=True) for t in tensors], async_op)


def all_gather_coalesced(
    output_tensors: list[torch.Tensor],
    input_tensors: list[torch.Tensor],
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """Gather the parts of several tensors over a group."""
    pairs = zip(output_tensors, input_tensors, strict=True)
    started = [dist.all_gather_into_tensor(o, i, group, async_op=True) for o, i in pairs]
    return _together(started, async_op)


def _together(handles: list[Any], async_op: bool) -> _Several | None:
    several = _Several(handles)
    if async_op:
        return several
    several.wait()
    return None


def has_all_gather_into_tensor() -> bool:
    """True: torch has it."""
    return True


has_reduce_scatter_tensor = has_all_reduce_coalesced = has_all_gather_into_tensor
has_coalescing_manager = has_all_gather_into_tensor
