"""What the bits of a forward depend on beside the layout."""

from __future__ import annotations

import hashlib
import platform
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import Op, Purpose, Tag
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain.job.job import Job


def fingerprint(device: torch.device) -> str:
    """Versions, kind of processor and threads: where they differ, kernels may round otherwise."""
    if device.type == "cpu":
        kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        kind += f", {torch.get_num_threads()} threads"
    else:
        kind = str(torch.get_device_module(device.type).get_device_name(device))
    return f"torch {torch.__version__}, {kind}"


def refuse_unlike_ranks(job: Job) -> None:
    """Check that all ranks compute with the same kernels. Collective.

    Raises:
        ConfigError: they do not; on every rank.
    """
    own = fingerprint(job.device)
    number = int.from_bytes(hashlib.sha256(own.encode()).digest()[:7], "little")
    told = torch.tensor([number, -number], dtype=torch.int64, device=job.device)
    tag = Tag(Purpose.CONTROL, site="kernels of all ranks")
    job.communicator.all_reduce(told, "world", tag, op=Op.MAX)
    if int(told[0]) != -int(told[1]):
        raise ConfigError(
            f"exact: ranks compute with different kernels, rank {job.rank} with {own}: start all "
            "of them on machines of one kind, with one version of torch and as many threads"
        )
