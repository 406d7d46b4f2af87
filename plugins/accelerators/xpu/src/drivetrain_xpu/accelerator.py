"""Intel GPUs as an accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drivetrain.contracts import Accelerator, hookimpl
from drivetrain_xpu.presence import why_absent

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import CommunicatorLayer
    from drivetrain.job.job import Job


class XpuAccelerator(Accelerator):
    """One GPU for each rank of a host, connected by XCCL; tensors in host memory go through gloo.

    Streams, events, memory statistics and pinned memory are torch's.
    """

    name = "xpu"
    device_type = "xpu"
    visible_devices_variable = "ZE_AFFINITY_MASK"

    def probe(self) -> str | None:
        reason = why_absent()
        if reason is None:
            import torch

            if torch.version.xpu is None:
                reason = "this torch is built without XPU; install a build with it"
        return reason

    def communication_backend(self) -> str:
        return "cpu:gloo,xpu:xccl"

    def supported_dtypes(self) -> Sequence[torch.dtype]:
        """All Intel GPUs that torch supports have half precision; most have bfloat16."""
        import torch

        if not torch.xpu.is_bf16_supported(including_emulation=False):
            return (torch.float32, torch.float16)
        return (torch.float32, torch.bfloat16, torch.float16)

    @hookimpl
    def wrap_communicator(self, job: Job) -> Sequence[CommunicatorLayer]:
        """Watch for ranks that fail; the communicator itself stays as it is."""
        from drivetrain_kernels.gpu.watch import watch

        watch(job)
        return ()
