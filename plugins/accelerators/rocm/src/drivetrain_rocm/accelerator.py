"""AMD GPUs as an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from drivetrain.contracts import Accelerator, hookimpl
from drivetrain_rocm.presence import why_absent

if TYPE_CHECKING:
    from drivetrain.contracts import CommunicatorLayer
    from drivetrain.job.job import Job


class RocmAccelerator(Accelerator):
    """One GPU for each rank of a host, connected by RCCL; tensors in host memory go through gloo.

    Torch calls the devices ``cuda`` and RCCL ``nccl``. Streams, events, memory statistics, dtypes
    and pinned memory are torch's.
    """

    name = "rocm"
    device_type = "cuda"
    visible_devices_variable = "HIP_VISIBLE_DEVICES"

    def probe(self) -> str | None:
        reason = why_absent()
        if reason is None:
            import torch

            if torch.version.hip is None:
                reason = "this torch is built without ROCm; install a build with it"
        return reason

    def communication_backend(self) -> str:
        return "cpu:gloo,cuda:nccl"

    def capture(self, function: Callable[[], None]) -> Callable[[], None] | None:
        """A graph; ``None`` if ``function`` does what a graph cannot hold, such as waiting."""
        from drivetrain_kernels.gpu.graphs import capture

        return capture(function)

    def range(self, name: str) -> AbstractContextManager[None]:
        """A roctx range, which rocprof shows; torch offers it under NVTX's name."""
        from torch.cuda import nvtx

        return nvtx.range(name)

    @hookimpl
    def wrap_communicator(self, job: Job) -> Sequence[CommunicatorLayer]:
        """Watch for ranks that fail; the communicator itself stays as it is."""
        from drivetrain_kernels.gpu.watch import watch

        watch(job)
        return ()
