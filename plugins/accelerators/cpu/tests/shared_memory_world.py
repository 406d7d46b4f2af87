"""A world of ranks that share memory, and what they exchange in the tests."""

from __future__ import annotations

import torch
import torch.distributed as dist
from drivetrain_cpu import shared_group
from drivetrain_cpu.shared_memory import SharedMemoryCommunicator, native_library

from drivetrain.communication.mesh import Mesh
from drivetrain.communication.torch_communicator import TorchCommunicator
from drivetrain.contracts import Purpose, Tag
from drivetrain.plan.mesh_layout import MeshLayout

TAG = Tag(Purpose.GRADIENT, "bucket0", "backward")
# Small slots, so that small tensors take many turns.
SLOT = 24 * 1024


class Counting(TorchCommunicator):
    """Counts what is not routed through memory."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.carried = []

    def run(self, collective):
        if collective.tag is not shared_group.SETUP:
            self.carried.append(collective.kind)
        return super().run(collective)


def start(slot=SLOT, timeout=60.0, library=native_library, broken_off=None):
    dist.init_process_group("gloo")
    mesh = Mesh(MeshLayout.build(dist.get_world_size(), ()), dist.get_rank())
    inner = Counting(mesh, torch.device("cpu"))
    return SharedMemoryCommunicator(
        inner, library, mesh.ranks, timeout, slot_bytes=slot, broken_off=broken_off
    )


def values(rank, dtype, numel):
    """Small whole numbers, exact in every dtype and in every sum of them."""
    return ((torch.arange(numel) * 7 + 3 * rank) % 11).to(dtype)
