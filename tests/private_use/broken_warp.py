"""Flaws that only a device beside the CPU can have, one each."""

from __future__ import annotations

from warp_accelerator import Warp


class ProbeTouchesDevice(Warp):
    def probe(self):
        super().probe()
        import torch

        torch.warp.set_device(0)


class DoesNotBecomeCurrent(Warp):
    """Its only device is the second one, as it says, and 0 stays current."""

    def device_count(self):
        return 2

    def device(self, local_rank):
        import torch

        return torch.device("warp", 1 - local_rank % 2)

    def start(self, local_rank, ranks_on_host):
        pass


class PinsNothing(Warp):
    def pin_memory(self, tensor):
        return tensor.clone()


class CountsHostMemory(Warp):
    """Tensors on the device do not count."""

    def memory_allocated(self):
        return 0


class AllRanksOnOneDevice(Warp):
    def device_count(self):
        return 2

    def device(self, local_rank):
        import torch

        return torch.device("warp", 0)
