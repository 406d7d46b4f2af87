"""The accelerator: the host's CPU, with one thread for each rank."""

from __future__ import annotations

import os
import resource

from drivetrain.contracts import Accelerator


class Lantern(Accelerator):
    """Torch knows the device already; what it does not tell of a CPU is its memory."""

    name = "lantern"
    device_type = "cpu"

    def probe(self) -> str | None:
        return None

    def communication_backend(self) -> str:
        return "gloo"

    def start(self, local_rank: int, ranks_on_host: int) -> None:
        import torch

        torch.set_num_threads(1)

    def memory_allocated(self) -> int:
        return self.max_memory_allocated()

    def max_memory_allocated(self) -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def reset_peak_memory(self) -> None:
        pass  # the system keeps it for the life of the process

    def total_memory(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
