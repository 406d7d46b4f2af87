"""Slurm: a step inside of an allocation, or a batch script that asks for one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace

from drivetrain.errors import DrivetrainError
from drivetrain_launch.launchers.base import Launcher
from drivetrain_launch.watch import Start
from drivetrain_launch.world import World


class Slurm(Launcher):
    """``srun`` with one task on each host; variables travel as Slurm does it."""

    name = "slurm"
    programs = ("srun",)

    def check(self, world: World) -> None:
        super().check(world)
        if "SLURM_JOB_ID" not in os.environ:
            raise DrivetrainError(
                "--launcher slurm starts a step of an allocation, and this process is in none: run "
                "the command in a batch script (--sbatch FILE writes one) or inside of salloc"
            )

    def starts(self, world: World) -> Sequence[Start]:
        hosts = ",".join(host.name for host in world.hosts)
        count = str(len(world.hosts))
        bare = replace(world, variables={})
        command = [
            *("srun", "--nodes", count, "--ntasks", count, "--ntasks-per-node", "1"),
            *("--nodelist", hosts, "--export=ALL", "--kill-on-bad-exit=0"),
            *("--cpu-bind=none", "--label", *self.settings.arguments),
            *self.node(bare.text()),
        ]
        return [Start(self.name, command, environment=world.variables)]


def batch_script(
    job: str, nodes: int, devices: int, command: Sequence[str], options: Sequence[str], log: str
) -> str:
    """A script for ``sbatch`` that runs a job on whole hosts and starts again after preemption.

    Args:
        job: its name.
        nodes: number of hosts.
        devices: GPUs of each; with 0 none is asked for, which a cluster without any would refuse.
        command: arguments of ``drivetrain launch``.
        options: further ``#SBATCH`` options.
        log: file of its output; ``%j`` is the number of the job.
    """
    lines = [
        f"--job-name={job}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={devices}"] if devices else []),
        "--exclusive",
        "--requeue",  # after preemption or the loss of a host it waits in the queue again
        "--signal=TERM@120",  # so long before the time limit the steps are asked to end
        "--open-mode=append",  # what was written before the requeue stays
        f"--output={log}",
        *options,
    ]
    head = "".join(f"#SBATCH {line}\n" for line in lines)
    return f"#!/bin/bash\n{head}\nexec {shlex.join(['drivetrain', 'launch', *command])}\n"
