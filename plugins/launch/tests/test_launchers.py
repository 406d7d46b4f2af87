"""What each launcher's program is called with, recorded by programs of its name."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from drivetrain_launch import watch
from drivetrain_launch.command import launch
from drivetrain_launch.ssh_command import ssh
from drivetrain_launch.world import World

from drivetrain.errors import DrivetrainError

NODE = [sys.executable, "-m", "drivetrain_launch.node"]

RECORDER = f"""#!{sys.executable}
import json, os, sys
record = {{"argv": sys.argv[1:], "env": dict(os.environ), "stdin": ""}}
if os.path.basename(sys.argv[0]) == "ssh":
    record["stdin"] = sys.stdin.readline()
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(record) + "\\n")
"""


@dataclass
class Recorded:
    """Programs that do nothing but write down how they were called."""

    folder: Path

    def program(self, name: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(RECORDER, "utf-8")
        path.chmod(0o755)

    def launch(self, *arguments: str) -> str:
        result = CliRunner().invoke(launch, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    @property
    def calls(self) -> list[dict]:
        path = self.folder / "record"
        text = path.read_text("utf-8") if path.exists() else ""
        made = [json.loads(line) for line in text.splitlines()]
        # at the end logs are fetched, too
        made = [call for call in made if not call["argv"][-1].startswith("tar ")]
        return sorted(made, key=lambda call: call["argv"])

    def call(self) -> dict:
        (only,) = self.calls
        return only


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    (tmp_path / "bin").mkdir()
    (tmp_path / "hosts").write_text("worker-0 slots=2\nworker-1 slots=2\n", "utf-8")
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith(("SLURM_", "WANDB_", "HF_", "NCCL"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    return Recorded(tmp_path)


def run(world: World, rank: int) -> list[str]:
    """What a host runs, without where its logs go."""
    command = world.run_command(rank)
    at = command.index("--log-dir")
    return command[:at] + command[at + 2 :]


def test_ssh_tells_each_host_its_place_and_the_job_through_the_connection(
    recorded: Recorded,
) -> None:
    recorded.program("ssh")
    recorded.launch("-H", "hosts", "--ssh-port", "2222", "train.py", "--lr", "1")
    calls = recorded.calls
    assert [call["argv"][-2] for call in calls] == ["worker-0", "worker-1"]
    for rank, call in enumerate(calls):
        *options, _host, line = call["argv"]
        assert options[-2:] == ["-p", "2222"]
        assert "BatchMode=yes" in options
        node = " ".join([*NODE, "--rank", str(rank), "-"])
        assert line == f"cd {recorded.folder} && exec {node}"
        assert "secret" not in " ".join(call["argv"])
        world = World.of_text(call["stdin"])
        assert world.variables["WANDB_API_KEY"] == "secret"
        assert run(world, rank) == [
            *("run", "--nproc", "2", "--nnodes", "2", "--node-rank", str(rank)),
            *("--master-addr", "worker-0", "--master-port", "29500", "--failure-format", "json"),
            *("--grace", "30.0", "--max-restarts", "0", "train.py", "--lr", "1"),
        ]


VANISHES = f"""#!{sys.executable}
import sys
host = sys.argv[-2]
if host == "worker-1":
    sys.stderr.write("Timeout, server worker-1 not responding.\\n")
    sys.exit(255)
if not sys.argv[-1].startswith("tar "):
    sys.stdin.readline()
    sys.stdin.read()  # until it is asked to end
"""


def test_a_host_that_vanishes_during_launch_is_named_and_the_others_end(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded.program("ssh")
    (recorded.folder / "bin" / "ssh").write_text(VANISHES, "utf-8")
    monkeypatch.setattr(watch, "_SETTLE_SECONDS", 0.0)
    with pytest.raises(DrivetrainError) as caught:
        recorded.launch("-H", "hosts", "--grace", "60", "train.py")
    assert str(caught.value).startswith(
        "host worker-1 cannot be reached by ssh without a password, or its connection broke: "
        "Timeout, server worker-1 not responding."
    )


def test_a_spare_is_asked_for_on_every_host(recorded: Recorded) -> None:
    recorded.program("ssh")
    recorded.launch("-H", "hosts", "--spare", "--max-restarts", "3", "train.py")
    for call in recorded.calls:
        assert World.of_text(call["stdin"]).options[-2:] == ("3", "--spare")


def test_a_setup_command_comes_first(recorded: Recorded) -> None:
    recorded.program("ssh")
    recorded.launch(
        "-H", "hosts", "--num-nodes", "1", "--setup", "source /v/bin/activate", "train.py"
    )
    assert recorded.call()["argv"][-1].startswith("source /v/bin/activate && cd ")


def test_pdsh_gets_one_line_for_all_hosts_and_no_secrets(recorded: Recorded) -> None:
    for name in ("pdsh", "ssh"):
        recorded.program(name)
    recorded.launch("-H", "hosts", "--launcher", "pdsh", "--ssh-port", "2222", "train.py")
    call = recorded.call()
    assert call["argv"][:7] == ["-S", "-R", "ssh", "-f", "1024", "-w", "worker-0,worker-1"]
    assert call["env"]["PDSH_SSH_ARGS_APPEND"] == "-p 2222"
    line = call["argv"][-1]
    assert "--rank %n " in line
    world = World.of_text(line.rpartition(" ")[2].replace("%%", "%"))
    assert world.variables["NCCL_DEBUG"] == "INFO"
    assert "WANDB_API_KEY" not in world.variables


@pytest.mark.parametrize(
    ("launcher", "program", "head"),
    [
        (
            "openmpi",
            "mpirun",
            ["-n", "2", "--host", "worker-0:1,worker-1:1", "--bind-to", "none", "-x"],
        ),
        ("mpich", "mpiexec", ["-n", "2", "-ppn", "1", "-hosts", "worker-0,worker-1", "-genvlist"]),
        (
            "impi",
            "mpirun",
            [
                *("-n", "2", "-ppn", "1", "-hosts", "worker-0,worker-1"),
                *("-genv", "I_MPI_PIN", "0", "-genvlist"),
            ],
        ),
    ],
)
def test_mpi_starts_one_process_a_host_and_takes_variables_by_name(
    recorded: Recorded, launcher: str, program: str, head: list[str]
) -> None:
    recorded.program(program)
    recorded.launch(
        "-H", "hosts", "--launcher", launcher, "--launcher-args", "-v", "train.py", "--x"
    )
    call = recorded.call()
    assert call["argv"][: len(head)] == head
    assert call["argv"][-5:-1] == ["-v", *NODE]
    assert "WANDB_API_KEY" in " ".join(call["argv"][len(head) : -5])
    assert "secret" not in call["argv"]
    assert call["env"]["WANDB_API_KEY"] == "secret"
    world = World.of_text(call["argv"][-1])
    assert (world.target, world.arguments, world.variables) == ("train.py", ("--x",), {})


def test_mvapich_gets_variables_with_values_but_no_secrets(recorded: Recorded) -> None:
    recorded.program("mpirun_rsh")
    recorded.launch("-H", "hosts", "--launcher", "mvapich", "--log-dir", "logs", "train.py")
    argv = recorded.call()["argv"]
    assert argv[:4] == ["-np", "2", "-hostfile", str(recorded.folder / "logs" / "mvapich.hosts")]
    assert (recorded.folder / "logs" / "mvapich.hosts").read_text() == "worker-0\nworker-1\n"
    assert "NCCL_DEBUG=INFO" in argv
    assert not any("secret" in part for part in argv)


def test_slurm_takes_the_hosts_of_the_allocation(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded.program("srun")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu3")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    recorded.launch("train.py")
    argv = recorded.call()["argv"]
    # srun takes the value of an option that may go without one only behind an equals sign
    assert argv[:10] == [
        *("--nodes", "1", "--ntasks", "1", "--ntasks-per-node", "1"),
        *("--nodelist", "gpu3", "--export=ALL", "--kill-on-bad-exit=0"),
    ]
    (host,) = World.of_text(argv[-1]).hosts
    assert (host.name, host.slots) == ("gpu3", (0, 1, 2, 3))


def test_outside_of_an_allocation_slurm_says_how_to_get_one(recorded: Recorded) -> None:
    recorded.program("srun")
    with pytest.raises(DrivetrainError, match="--sbatch FILE writes one"):
        recorded.launch("-H", "hosts", "--launcher", "slurm", "train.py")


def test_a_batch_script_asks_for_hosts_and_starts_again_after_preemption(
    recorded: Recorded,
) -> None:
    said = recorded.launch(
        *("--sbatch", "job.sh", "--num-nodes", "4", "--num-gpus", "8"),
        *("--launcher-args", "--partition=big --time=1:00:00", "train.py", "--name", "a b"),
    )
    assert "sbatch job.sh" in said
    lines = (recorded.folder / "job.sh").read_text("utf-8").splitlines()
    assert lines[0] == "#!/bin/bash"
    for option in (
        *("--nodes=4", "--gpus-per-node=8", "--ntasks-per-node=1", "--requeue"),
        *("--signal=TERM@120", "--open-mode=append", "--partition=big", "--time=1:00:00"),
    ):
        assert f"#SBATCH {option}" in lines
    assert lines[-1].startswith("exec drivetrain launch --num-gpus 8 ")
    assert lines[-1].endswith("train.py --name 'a b'")


@pytest.mark.parametrize("how", ["option", "variable"])
def test_a_job_on_the_cpu_asks_slurm_for_no_gpus(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "variable":
        monkeypatch.setenv("DRIVETRAIN_ACCELERATOR", "cpu")
    option = ["--accelerator", "cpu"] if how == "option" else []
    recorded.launch(
        *("--sbatch", "job.sh", "--num-nodes", "2", "--num-gpus", "4", *option, "train.py"),
    )
    lines = (recorded.folder / "job.sh").read_text("utf-8").splitlines()
    assert "#SBATCH --nodes=2" in lines
    assert not [line for line in lines if "gpu" in line and line.startswith("#SBATCH")]
    # four ranks on each host, as before, and on the accelerator that was named
    assert lines[-1].startswith("exec drivetrain launch --num-gpus 4 ")
    assert ("--accelerator cpu" in lines[-1]) == (how == "option")


def test_an_accelerator_that_is_not_installed_is_named(recorded: Recorded) -> None:
    with pytest.raises(DrivetrainError, match="abacus"):
        recorded.launch(
            "--sbatch", "job.sh", "--num-nodes", "2", "--accelerator", "abacus", "train.py"
        )
    assert not (recorded.folder / "job.sh").exists()


def test_kubernetes_gets_a_trainjob_whose_pods_join(recorded: Recorded) -> None:
    recorded.program("kubectl")
    recorded.launch(
        *("--launcher", "kubernetes", "--num-nodes", "3", "--num-gpus", "8"),
        *("--image", "registry/train:1", "--log-dir", "logs", "train.py", "--lr", "1"),
    )
    path = recorded.folder / "logs" / "trainjob.json"
    assert recorded.call()["argv"] == ["create", "-f", str(path)]
    job = json.loads(path.read_text("utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["metadata"] == {"generateName": "train-"}
    trainer = job["spec"]["trainer"]
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    assert (trainer["numNodes"], trainer["image"]) == (3, "registry/train:1")
    assert trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": "8"}}
    assert trainer["command"][:7] == [
        *("python", "-m", "drivetrain.cli", "launch", "--join", "--num-gpus", "8"),
    ]
    assert trainer["command"][-3:] == ["train.py", "--lr", "1"]
    names = {variable["name"] for variable in trainer["env"]}
    assert "NCCL_DEBUG" in names
    assert "WANDB_API_KEY" not in names


def test_a_trainjob_on_the_cpu_asks_for_no_gpus_and_has_a_name_that_the_api_takes(
    recorded: Recorded,
) -> None:
    recorded.program("kubectl")
    recorded.launch(
        *("--launcher", "kubernetes", "--num-nodes", "2", "--num-gpus", "4", "--image", "i"),
        *("--accelerator", "cpu", "--log-dir", "logs", "-m", "7_Steps"),
    )
    job = json.loads((recorded.folder / "logs" / "trainjob.json").read_text("utf-8"))
    name = job["metadata"]["generateName"] + "x7k2p"  # as the API server completes it
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 63
    trainer = job["spec"]["trainer"]
    assert "resourcesPerNode" not in trainer
    assert {"name": "DRIVETRAIN_ACCELERATOR", "value": "cpu"} in trainer["env"]
    assert trainer["command"][5:7] == ["--num-gpus", "4"]


FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec", "status"},
    "spec": {
        *("runtimeRef", "initializer", "trainer", "runtimePatches", "suspend"),
        *("activeDeadlineSeconds", "managedBy"),
    },
    "spec.runtimeRef": {"name", "apiGroup", "kind"},
    "spec.trainer": {
        *("image", "command", "args", "env", "numNodes", "resourcesPerNode", "numProcPerNode"),
    },
    "spec.trainer.resourcesPerNode": {"limits", "requests", "claims"},
}
"""Of the CRD ``trainjobs.trainer.kubeflow.org`` in Kubeflow Trainer 2.3.0, version v1alpha1."""


def test_a_trainjob_has_no_field_that_the_api_does_not_have(recorded: Recorded) -> None:
    recorded.program("kubectl")
    recorded.launch("--launcher", "kubernetes", "--image", "i", "--log-dir", "logs", "train.py")
    job = json.loads((recorded.folder / "logs" / "trainjob.json").read_text("utf-8"))
    for path, known in FIELDS.items():
        part = job
        for name in filter(None, path.split(".")):
            part = part[name]
        assert part.keys() <= known, path
    reserved = {f"PET_{n}" for n in ("NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR")}
    assert not reserved & {variable["name"] for variable in job["spec"]["trainer"]["env"]}


def test_a_pod_joins_with_what_its_variables_say(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = {"NODE_RANK": "1", "NNODES": "2", "MASTER_ADDR": "job-0.job", "MASTER_PORT": "29400"}
    for name, value in pod.items():
        monkeypatch.setenv(f"PET_{name}", value)
    said = recorded.launch("--join", "--num-gpus", "8", "--dry-run", "-m", "train", "--lr", "1")
    assert said.split()[1:] == [
        *("-m", "drivetrain.cli", "run", "--nproc", "8", "--nnodes", "2", "--node-rank", "1"),
        *("--master-addr", "job-0.job", "--master-port", "29400"),
        *("--grace", "30.0", "--max-restarts", "0", "--module", "train", "--lr", "1"),
    ]


def test_nothing_to_join_is_said(recorded: Recorded) -> None:
    with pytest.raises(DrivetrainError, match=r"no variables on .* tell of a job"):
        recorded.launch("--join", "train.py")


def test_a_dry_run_shows_what_would_run_and_starts_nothing(recorded: Recorded) -> None:
    recorded.program("ssh")
    said = recorded.launch("-H", "hosts", "-i", "worker-1:1", "--dry-run", "train.py")
    assert "1 hosts, 1 ranks" in said
    assert "worker-1 (slots 1): run --nproc 1 --log-dir" in said
    assert "start worker-1: ssh " in said
    assert recorded.calls == []
    assert not (recorded.folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.py"], "no hosts: give --hostfile, or start inside of a Slurm allocation"),
        (["-H", "hosts", "--launcher", "pssh", "train.py"], "did you mean 'ssh'"),
        (["-H", "hosts", "--launcher", "pdsh", "train.py"], "needs the program pdsh"),
        (["-H", "hosts", "--export", "NOPE", "train.py"], "--export NOPE: the variable is not set"),
        (["--sbatch", "x", "train.py"], "--sbatch needs --num-nodes"),
    ],
)
def test_what_cannot_be_started_is_said_before_anything_is(
    recorded: Recorded, arguments: list[str], message: str
) -> None:
    with pytest.raises(DrivetrainError, match=re.escape(message)):
        recorded.launch(*arguments)
    assert recorded.calls == []


def test_launchers_that_need_equal_hosts_say_which_differ(recorded: Recorded) -> None:
    recorded.program("kubectl")
    (recorded.folder / "hosts").write_text("worker-0 slots=2\nworker-1 slots=3\n", "utf-8")
    with pytest.raises(DrivetrainError, match="got worker-0: 2, worker-1: 3"):
        recorded.launch("-H", "hosts", "--launcher", "kubernetes", "--image", "i", "train.py")


def test_a_command_runs_on_every_host(recorded: Recorded) -> None:
    recorded.program("ssh")
    result = CliRunner().invoke(ssh, ["-H", "hosts", "-e", "worker-1", "nvidia-smi", "-L"])
    assert result.exit_code == 0, result.output
    assert recorded.call()["argv"][-2:] == ["worker-0", "nvidia-smi -L"]
