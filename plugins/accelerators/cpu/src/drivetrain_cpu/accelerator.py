"""The host's CPUs as an accelerator."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from drivetrain.contracts import Accelerator, hookimpl
from drivetrain.errors import BuildError
from drivetrain_cpu import binding, memory
from drivetrain_cpu.plugin import CpuSection

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import CommunicatorLayer
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan

logger = logging.getLogger("drivetrain.cpu")


class CpuAccelerator(Accelerator):
    """Ranks on cores of one host or many, connected by gloo and shared memory.

    Memory statistics count the whole process, since torch does not count tensors in host memory.
    """

    name = "cpu"
    device_type = "cpu"

    def __init__(self) -> None:
        self._section = CpuSection()

    def probe(self) -> str | None:
        return None

    def configure(self, plan: Plan) -> None:
        self._section = plan.section(CpuSection)

    def communication_backend(self) -> str:
        return "gloo"

    def start(self, local_rank: int, ranks_on_host: int) -> None:
        """Bind this process to its cores and set its number of threads."""
        import torch

        cores = binding.cores_of(binding.inherited_cpus())
        # Cores go first: threads that exist already stay where they are.
        if binding.wants_binding(self._section.bind_cores, cores, ranks_on_host):
            mine = binding.share(cores, local_rank, ranks_on_host)
            os.sched_setaffinity(0, [cpu for core in mine for cpu in core])
            logger.info("local rank %d runs on cores %s", local_rank, mine)
        threads = self._section.threads
        torch.set_num_threads(binding.number_of_threads(threads, cores, ranks_on_host, os.environ))

    def supported_dtypes(self) -> Sequence[torch.dtype]:
        import torch

        # Other CPUs convert to float32 and back; oneDNN knows which have instructions.
        native = {
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        }
        return (torch.float32, *(dtype for dtype, supported in native.items() if supported()))

    def memory_allocated(self) -> int:
        return memory.resident()

    def max_memory_allocated(self) -> int:
        return memory.peak()

    def reset_peak_memory(self) -> None:
        if not memory.reset_peak():
            logger.debug("the system keeps the peak of memory for the life of the process")

    def total_memory(self) -> int:
        return memory.total()

    def capture(self, function: Callable[[], None]) -> Callable[[], None] | None:
        """A list of the kernels' calls; ``None`` where ``function`` computes anything else."""
        from drivetrain_cpu.instruction_sets import selected
        from drivetrain_cpu.kernels import kernel_library, program

        try:
            library = kernel_library(selected()).load()
        except BuildError:
            return None
        return program.capture(function, library)

    @hookimpl
    def wrap_communicator(self, job: Job) -> Sequence[CommunicatorLayer]:
        """Let ranks of one host communicate through shared memory."""
        if not self._section.shared_memory:
            return ()
        from drivetrain_cpu.shared_memory import share_memory

        return share_memory(job)
