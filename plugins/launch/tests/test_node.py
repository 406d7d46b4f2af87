"""One host's part: what it refuses to take part in, and how it ends with its connection."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from drivetrain_launch import node
from drivetrain_launch.hosts import Host
from drivetrain_launch.watch import failure_in
from drivetrain_launch.world import World, own_versions

from drivetrain.errors import DrivetrainError


def world(folder: Path) -> World:
    (folder / "train.py").touch()
    hosts = (Host("worker-0", (0,)), Host("worker-1", (0, 1)))
    return World(
        hosts, "worker-0", 29500, str(folder), str(folder), "train.py", versions=own_versions()
    )


def take_part(job: World, rank: int | None, **variables: str) -> str:
    """What a host says that does not take part."""
    place = [] if rank is None else ["--rank", str(rank)]
    command = [sys.executable, "-m", "drivetrain_launch.node", *place, job.text()]
    done = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    failure = failure_in(done.stderr)
    assert failure is not None, done.stderr
    return f"{failure.host}: {failure.text}"


def test_a_description_survives_its_way(tmp_path: Path) -> None:
    job = replace(world(tmp_path), variables={"A": "ü % \"'"}, arguments=("a b",))
    assert World.of_text(job.text() + "\n") == job


def test_a_host_with_other_versions_names_both(tmp_path: Path) -> None:
    versions = {**own_versions(), "torch": "1.0"}
    said = take_part(replace(world(tmp_path), versions=versions), 1)
    own = own_versions()["torch"]
    assert said.startswith(f"worker-1: host worker-1 has torch {own} where the launching host has")


def test_a_host_without_the_folder_or_the_script_says_so(tmp_path: Path) -> None:
    job = world(tmp_path)
    said = take_part(replace(job, folder=str(tmp_path / "away")), 0)
    assert "worker-0 has no folder" in said
    assert "worker-0 has no script" in take_part(replace(job, target="other.py"), 0)


def test_a_host_that_nobody_tells_its_place_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in os.environ if n.startswith(("SLURM_", "OMPI_", "PMI", "PET_", "MV2"))]:
        monkeypatch.delenv(name)
    assert "nothing says which of the 2 hosts this is" in take_part(world(tmp_path), None)
    openmpi = {
        f"OMPI_COMM_WORLD_{name}": value
        for name, value in {"RANK": "1", "SIZE": "4", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}.items()
    }
    said = take_part(world(tmp_path), None, **openmpi)
    assert "OpenMPI has started 4 processes for 2 hosts" in said


class Registered:
    """A registry with one accelerator, which has four devices."""

    visible_devices_variable = "TOY_DEVICES"

    def names(self, _group: str) -> list[str]:
        return ["toy"]

    def load(self, _group: str, _name: str) -> type[Registered]:
        return type(self)

    def probe(self) -> None:
        return None

    def device_count(self) -> int:
        return 4


def test_slots_choose_among_the_devices_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.Registry, "installed", lambda: Registered())
    assert node.visible_devices((1, 3), {}, "a") == {"TOY_DEVICES": "1,3"}
    own = {"TOY_DEVICES": "4,5,6,7"}
    assert node.visible_devices((0, 2), own, "a") == {"TOY_DEVICES": "4,6"}
    with pytest.raises(DrivetrainError, match=r"host a has 4 devices \(TOY_DEVICES\), but slot 4"):
        node.visible_devices((0, 4), {}, "a")


def test_a_host_ends_when_its_connection_does(tmp_path: Path) -> None:
    script = "import signal; print('up', flush=True); signal.pause()"
    code = (
        "import sys; from drivetrain_launch import node;"
        f"sys.stdin.readline(); sys.exit(node._run([sys.executable, '-c', {script!r}],"
        " {}, lifeline=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    assert process.stdout.readline() == "up\n"
    process.stdin.close()
    assert process.wait(timeout=30) in (-signal.SIGTERM, 256 - signal.SIGTERM)
    process.stdout.close()
