"""Jobs of two hosts from the command to the last line, on one machine.

In the ordinary test ``ssh`` is a program that runs the line here. The long ones use the programs
themselves, where they are installed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], sys.argv[1:], flush=True)
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
if sys.argv[1:] == ["fail"] and os.environ["RANK"] == os.environ["FAILS"]:
    raise ValueError("no good")
dist.barrier()
"""

HERE = """#!/bin/sh
for line; do :; done
exec sh -c "$line"
"""


def launch(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(SCRIPT, "utf-8")
    return launch_command(folder, "--log-dir", "logs", *arguments, **variables)


def launch_command(
    folder: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "drivetrain.cli", "launch", *arguments]
    environment = {**os.environ, "FAILS": "2", **variables}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def hosts(folder: Path) -> None:
    (folder / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=2\n", "utf-8")


def test_a_failure_is_shown_once_with_its_host_and_rank(tmp_path: Path) -> None:
    hosts(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(HERE, "utf-8")
    (tmp_path / "bin" / "ssh").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    wanted = ["--export", "FAILS"]
    done = launch(tmp_path, "-H", "hosts", *wanted, "train.py", "fail", PATH=path)
    assert done.returncode == 2
    assert "[localhost] rank 0 of 3 ['fail']" in done.stdout
    assert "[127.0.0.1] rank 1 of 3 ['fail']" in done.stdout
    assert done.stderr.count("error: ") == 1
    assert "error: host 127.0.0.1: rank 2 failed: ValueError: no good" in done.stderr
    logs = tmp_path / "logs"
    assert {p.name for p in logs.glob("*/rank*.log")} == {"rank0.log", "rank1.log", "rank2.log"}


@pytest.fixture
def ssh_server(tmp_path: Path) -> Iterator[str]:
    """Arguments of ssh that reach a server of this machine."""
    if shutil.which("sshd", path="/usr/sbin:/sbin") is None or os.geteuid() != 0:
        pytest.skip("no sshd here, or not allowed to start it")
    for name in ("key", "host"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(command, check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # where the server locks itself in
    lines = {
        "Port": "29622",
        "ListenAddress": "127.0.0.1",
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "key.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
    }
    config = tmp_path / "sshd_config"
    config.write_text("".join(f"{key} {value}\n" for key, value in lines.items()), "utf-8")
    server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", str(config)])
    unknown = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    yield f"-p 29622 -i {tmp_path / 'key'} {unknown}"
    server.terminate()
    server.wait()


@pytest.mark.long
def test_two_hosts_over_a_real_connection(tmp_path: Path, ssh_server: str) -> None:
    hosts(tmp_path)
    done = launch(tmp_path, "-H", "hosts", "--launcher-args", ssh_server, "train.py", "x")
    assert done.returncode == 0, done.stderr
    assert "[localhost] rank 0 of 3 ['x']" in done.stdout
    assert "[127.0.0.1] rank 1 of 3 ['x']" in done.stdout


@pytest.mark.long
def test_two_hosts_through_pdsh(tmp_path: Path, ssh_server: str) -> None:
    if shutil.which("pdsh") is None:
        pytest.skip("no pdsh here")
    hosts(tmp_path)
    own = {"PDSH_SSH_ARGS": f"{ssh_server} %h"}
    done = launch(tmp_path, "-H", "hosts", "--launcher", "pdsh", "train.py", "x", **own)
    assert done.returncode == 0, done.stderr
    assert "localhost: rank 0 of 3 ['x']" in done.stdout
    assert "127.0.0.1: rank 1 of 3 ['x']" in done.stdout


@pytest.mark.long
def test_a_host_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=1\n", "utf-8")
    done = launch(tmp_path, "-H", "hosts", "--ssh-port", "29623", "train.py")
    assert done.returncode == 2
    assert "host localhost cannot be reached by ssh without a password" in done.stderr
    assert "Connection refused" in done.stderr


@pytest.mark.long
def test_ranks_of_openmpi(tmp_path: Path) -> None:
    if shutil.which("mpirun") is None or shutil.which("ompi_info") is None:
        pytest.skip("no OpenMPI here")
    (tmp_path / "hosts").write_text("localhost slots=2\n", "utf-8")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "FAILS": "1"}
    arguments = ["-H", "hosts", "--launcher", "openmpi", "--export", "FAILS", "train.py", "fail"]
    done = launch(tmp_path, *arguments, **root)
    assert done.returncode == 2
    assert "rank 0 of 2 ['fail']" in done.stdout
    assert "error: host localhost: rank 1 failed: ValueError: no good" in done.stderr


def slurm(*words: str) -> str:
    """What a command of Slurm says; skips the test where there is no Slurm."""
    if shutil.which(words[0]) is None or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no Slurm here that answers")
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@pytest.mark.long
def test_a_step_of_slurm(tmp_path: Path) -> None:
    slurm("sinfo")
    (tmp_path / "train.py").write_text(SCRIPT, "utf-8")
    inside = [
        sys.executable,
        "-m",
        "drivetrain.cli",
        "launch",
        "--num-gpus",
        "2",
        "train.py",
        "fail",
    ]
    done = subprocess.run(
        ["salloc", "--nodes", "1", "--ntasks", "2", *inside],
        cwd=tmp_path,
        env={**os.environ, "FAILS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "rank 0 of 2 ['fail']" in done.stdout
    assert "rank 1 failed: ValueError: no good" in done.stderr


LEAVES = """
import os, signal, sys
from pathlib import Path
rank = os.environ["RANK"]
def leave(*_):
    Path(f"saved{rank}").touch()
    sys.exit(0)
if Path(f"saved{rank}").exists():
    Path("aside" + rank).write_text(os.environ["SLURM_RESTART_COUNT"])
    Path("aside" + rank).rename(f"finished{rank}")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
Path(f"up{rank}").touch()
while True: signal.pause()
"""


@pytest.mark.long
def test_a_job_of_slurm_s_queue_saves_when_it_is_preempted_and_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "gpu" not in slurm("sinfo", "-h", "-o", "%G"):
        pytest.skip("Slurm's hosts have no gpu here, and a batch script asks for some")
    (tmp_path / "train.py").write_text(LEAVES, "utf-8")
    done = launch_command(
        tmp_path, "--sbatch", "job.sh", "--num-nodes", "1", "--num-gpus", "2", "train.py"
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    folder = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    number = slurm("sbatch", "--parsable", "job.sh").strip()

    def awaited(what: str) -> None:
        while not all((tmp_path / f"{what}{rank}").exists() for rank in (0, 1)):
            assert slurm("squeue", "-h", "-j", number), "the job has ended"
            time.sleep(0.5)

    try:
        awaited("up")
        slurm("scontrol", "requeue", number)  # as preemption does
        awaited("saved")
        awaited("finished")  # Slurm lets the job wait for two minutes
    finally:
        subprocess.run(["scancel", number], check=False)
    assert [(tmp_path / f"finished{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


@pytest.mark.long
def test_hosts_of_ray(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None or "RAY_ADDRESS" not in os.environ:
        pytest.skip("no Ray here, or no cluster of it (RAY_ADDRESS)")
    arguments = ["--launcher", "ray", "--num-nodes", "1", "--num-gpus", "2", "--export", "FAILS"]
    done = launch(tmp_path, *arguments, "train.py", "fail", FAILS="1")
    assert done.returncode == 2
    assert "rank 0 of 2 ['fail']" in done.stdout
    assert "rank 1 failed: ValueError: no good" in done.stderr
