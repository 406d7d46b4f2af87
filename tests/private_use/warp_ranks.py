"""Several ranks, each with a C++ device of its own: gloo, on memory that it takes for a host's."""

from __future__ import annotations

import ctypes
from datetime import timedelta
from typing import Any

from warp_accelerator import Warp


class WarpWithRanks(Warp):
    """The device with collectives."""

    def probe(self) -> str | None:
        reason = super().probe()
        _register_backend()
        return reason

    def communication_backend(self) -> str:
        return "warp_gloo"


def _register_backend() -> None:
    """Make ``torch.distributed`` know the backend."""
    import torch
    import torch.distributed as dist

    if "WARP_GLOO" in dist.Backend._plugins:
        return

    def seen(value: Any) -> Any:
        """The same memory as gloo can use it."""
        if isinstance(value, list):
            return [seen(item) for item in value]
        if not isinstance(value, torch.Tensor) or value.device.type != "warp":
            return value
        if not value.numel():
            return torch.empty(value.shape, dtype=value.dtype)
        assert value.is_contiguous()
        memory: Any = (ctypes.c_char * value.nbytes).from_address(value.data_ptr())
        memory.owner = value  # what is under way keeps it
        return torch.frombuffer(memory, dtype=torch.uint8).view(value.dtype).view(value.shape)

    class Group(dist.ProcessGroup):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            super().__init__(rank, size)
            self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)

        def getBackendName(self) -> str:
            return "warp_gloo"

    def through(name: str, gloo_name: str) -> None:
        def call(group: Group, *arguments: Any) -> Any:
            return getattr(group.gloo, gloo_name)(*map(seen, arguments))

        setattr(Group, name, call)

    for name in ("allreduce", "broadcast", "allgather", "send", "recv", "barrier"):
        through(name, name)
    for new, old in {
        "all_gather_single": "_allgather_base",
        "reduce_scatter_single": "_reduce_scatter_base",
        "all_to_all_single": "alltoall_base",
    }.items():
        through(new, old)
        through(old, old)
    dist.Backend.register_backend("warp_gloo", Group, devices=["cpu", "warp"])
