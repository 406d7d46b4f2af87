"""The process that asks Ray for nodes and runs a job's hosts on them, until all have ended.

    python -m drivetrain_launch.ray_driver -

The first line of the standard input describes the job.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from drivetrain.errors import DrivetrainError
from drivetrain_launch.devices import needs_devices
from drivetrain_launch.hosts import Host
from drivetrain_launch.world import World


def main() -> int:
    """Run a job; answers the largest exit status of its hosts."""
    import ray  # type: ignore[import-not-found]
    from ray.util.placement_group import (  # type: ignore[import-not-found]
        placement_group,
        remove_placement_group,
    )
    from ray.util.scheduling_strategies import (  # type: ignore[import-not-found]
        PlacementGroupSchedulingStrategy,
    )

    world = World.of_text(sys.stdin.readline())
    # Without "auto" Ray would start a cluster of this host alone where it finds none.
    ray.init(address="auto", log_to_driver=True)  # RAY_ADDRESS comes first
    slots = len(world.hosts[0].slots)
    gpus = needs_devices(world.variables) and ray.cluster_resources().get("GPU", 0) > 0
    needs = {"GPU": slots} if gpus else {"CPU": slots}
    group = placement_group([needs] * len(world.hosts), strategy="STRICT_SPREAD")
    try:
        if not group.wait(timeout_seconds=60):
            raise DrivetrainError(
                f"Ray has not {len(world.hosts)} nodes with {needs} each, or they are in use"
            )

        def on(rank: int) -> object:
            return PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=rank
            )

        address = ray.remote(num_cpus=0)(ray.util.get_node_ip_address)
        names = ray.get(
            [
                address.options(scheduling_strategy=on(rank)).remote()
                for rank in range(len(world.hosts))
            ]
        )
        hosts = tuple(Host(name, host.slots) for name, host in zip(names, world.hosts, strict=True))
        placed = replace(world, hosts=hosts, master_addr=names[0]).text()
        run = ray.remote(num_cpus=0, **({"num_gpus": slots} if gpus else {}), max_retries=0)(_host)
        tasks = [
            run.options(scheduling_strategy=on(rank)).remote(rank, placed)
            for rank in range(len(hosts))
        ]
        return int(max(ray.get(tasks)))
    finally:
        remove_placement_group(group)
        ray.shutdown()


def _host(rank: int, world: str) -> int:
    """Run one host's part in Ray's worker process, which ends with it."""
    command = [sys.executable, "-m", "drivetrain_launch.node", "--rank", str(rank), world]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
