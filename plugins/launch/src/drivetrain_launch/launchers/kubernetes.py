"""Kubernetes: a manifest for Kubeflow Trainer, whose pods each run one host's part."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drivetrain.errors import DrivetrainError
from drivetrain_launch.devices import ACCELERATOR, needs_devices
from drivetrain_launch.launchers.base import Launcher
from drivetrain_launch.variables import without_secrets
from drivetrain_launch.watch import Start
from drivetrain_launch.world import World

_RESOURCES = {"rocm": "amd.com/gpu"}
"""Accelerator -> what the device plugin of its vendor calls a device, where that is not NVIDIA."""


class Kubernetes(Launcher):
    """``kubectl create`` with a ``TrainJob``; hosts are pods, so a hostfile has no names to give.

    Kubeflow Trainer tells each pod its place by the variables ``PET_*``.
    """

    name = "kubernetes"
    programs = ("kubectl",)
    equal_slots = True

    def check(self, world: World) -> None:
        super().check(world)
        if not self.settings.image:
            raise DrivetrainError(
                "--launcher kubernetes needs --image: a container image with the script's packages "
                "and drivetrain-launch in it"
            )

    def starts(self, world: World) -> Sequence[Start]:
        path = Path(world.logs) / "trainjob.json"
        path.write_text(json.dumps(self.manifest(world), indent=2) + "\n", "utf-8")
        return [Start(self.name, ["kubectl", "create", "-f", str(path), *self.settings.arguments])]

    def manifest(self, world: World) -> dict[str, Any]:
        """The ``TrainJob`` (trainer.kubeflow.org/v1alpha1), as Kubernetes takes it."""
        variables = without_secrets(world.variables, self.settings.named)
        slots = str(len(world.hosts[0].slots))
        limits = {_resource(variables): slots} if needs_devices(variables) else {}
        command = [
            *("python", "-m", "drivetrain.cli", "launch", "--join", "--num-gpus", slots),
            *(*world.options, *(["--module"] if world.module else []), world.target),
            *world.arguments,
        ]
        name = re.sub(r"[^a-z0-9]+", "-", Path(world.target).stem.lower()).strip("-")
        if not name[:1].isalpha():  # as the API wants it (a label of RFC 1035)
            name = f"job-{name}"
        return {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"generateName": f"{name[:40].strip('-')}-"},
            "spec": {
                "runtimeRef": {"name": "torch-distributed"},
                "trainer": {
                    "image": self.settings.image,
                    "numNodes": len(world.hosts),
                    "command": command,
                    "env": [{"name": k, "value": v} for k, v in sorted(variables.items())],
                    **({"resourcesPerNode": {"limits": limits}} if limits else {}),
                },
            },
        }

    def explain(self, who: str, code: int, tail: Sequence[str]) -> str:
        said = f": {tail[-1]}" if tail else ""
        return f"kubectl did not create the job{said}"

    def collect(self, world: World, logs: Path) -> str:
        return f"kubectl logs of the job's pods; its manifest: {logs / 'trainjob.json'}"


def _resource(variables: Mapping[str, str]) -> str:
    return _RESOURCES.get(variables.get(ACCELERATOR, ""), "nvidia.com/gpu")
