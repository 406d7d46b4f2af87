"""What the ranks of ``kernels.py`` run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from drivetrain.contracts import Communicator, Purpose, Tag

TAG = Tag(Purpose.GRADIENT, "benchmark")
Contenders = Mapping[str, Callable[[], object]]
Clock = Callable[[], float]


def take_turns(
    contenders: Contenders,
    rounds: int,
    before: Callable[[], object] = lambda: None,
    finish: Callable[[], object] = lambda: None,
    calls: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; one round more is run and forgotten.

    A turn is ``calls`` calls and then ``finish``, which waits for a device; its time is divided.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            before()
            began = clock()
            for _ in range(calls):
                run()
            finish()
            if number:
                times[name].append((clock() - began) / calls)
    return times


def time_collectives(elements: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """On a rank: seconds by collective, contender and round."""
    from drivetrain_cpu.shared_memory import SharedMemoryCommunicator, native_library

    from drivetrain.communication.mesh import Mesh
    from drivetrain.communication.torch_communicator import TorchCommunicator
    from drivetrain.plan.mesh_layout import MeshLayout

    dist.init_process_group("gloo")
    mesh = Mesh(MeshLayout.build(dist.get_world_size(), ()), dist.get_rank())
    gloo = TorchCommunicator(mesh, torch.device("cpu"))
    shared = SharedMemoryCommunicator(gloo, native_library, mesh.ranks)
    buffer = shared.buffer(elements, torch.float32, "data")
    ordinary = torch.zeros(elements)
    routes = {
        "gloo": (gloo, ordinary),
        "shared memory": (shared, ordinary),
        "shared memory, buffer()": (shared, buffer),
    }
    found = {}
    for name, collective in COLLECTIVES.items():
        contenders = {
            route: lambda c=c, x=x, collective=collective: collective(c, x)
            for route, (c, x) in routes.items()
        }
        found[name] = take_turns(contenders, rounds, dist.barrier)
    shared.close()
    return found


def all_reduce(c: Communicator, x: torch.Tensor) -> None:
    c.all_reduce(x, "data", TAG)


def reduce_scatter(c: Communicator, x: torch.Tensor) -> None:
    c.reduce_scatter(_own_part(c, x), x, "data", TAG)


def all_gather(c: Communicator, x: torch.Tensor) -> None:
    c.all_gather(x, _own_part(c, x), "data", TAG)


def all_to_all(c: Communicator, x: torch.Tensor) -> None:
    sent, received = x.view(2, -1)
    c.all_to_all(received, sent, "data", TAG)


def small_all_reduces(c: Communicator, x: torch.Tensor) -> None:
    for _ in range(100):
        c.all_reduce(x[:1024], "data", TAG)


COLLECTIVES = {
    "reduce-scatter": reduce_scatter,
    "all-gather": all_gather,
    "all-reduce": all_reduce,
    "all-to-all": all_to_all,
    "100 all-reduces of 4 KiB": small_all_reduces,
}


def _own_part(c: Communicator, x: torch.Tensor) -> torch.Tensor:
    return x.view(c.size("data"), -1)[c.rank("data")]
