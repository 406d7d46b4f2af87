"""NVIDIA GPUs as an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from drivetrain.contracts import Accelerator, hookimpl
from drivetrain_cuda.presence import why_absent

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import CommunicatorLayer
    from drivetrain.job.job import Job


class CudaAccelerator(Accelerator):
    """One GPU for each rank of a host, connected by NCCL; tensors in host memory go through gloo.

    Streams, events, memory statistics and pinned memory are torch's.
    """

    name = "cuda"
    device_type = "cuda"
    visible_devices_variable = "CUDA_VISIBLE_DEVICES"

    def probe(self) -> str | None:
        reason = why_absent()
        if reason is None:
            import torch

            if torch.version.cuda is None:
                reason = "this torch is built without CUDA; install a build with it"
        return reason

    def communication_backend(self) -> str:
        return "cpu:gloo,cuda:nccl"

    def supported_dtypes(self) -> Sequence[torch.dtype]:
        """Half precision from compute capability 7.0 on, bfloat16 from 8.0 on."""
        import torch

        major = torch.cuda.get_device_capability()[0]
        half = (torch.float16,) if major >= 7 else ()
        return (torch.float32, torch.bfloat16, *half) if major >= 8 else (torch.float32, *half)

    def capture(self, function: Callable[[], None]) -> Callable[[], None] | None:
        """A graph; ``None`` if ``function`` does what a graph cannot hold, such as waiting."""
        from drivetrain_kernels.gpu.graphs import capture

        return capture(function)

    def range(self, name: str) -> AbstractContextManager[None]:
        """An NVTX range, which Nsight shows."""
        from torch.cuda import nvtx

        return nvtx.range(name)

    @hookimpl
    def wrap_communicator(self, job: Job) -> Sequence[CommunicatorLayer]:
        """Watch for ranks that fail; the communicator itself stays as it is."""
        from drivetrain_kernels.gpu.watch import watch

        watch(job)
        return ()
