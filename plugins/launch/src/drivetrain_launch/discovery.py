"""This process's place in a job, from the variables of whoever has started it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from drivetrain.errors import DrivetrainError

_AZURE_PORT = 54965
_PORT = 29500


@dataclass(frozen=True)
class Place:
    """The place of a process among those that were started together.

    Args:
        source: who has started them.
        rank: of all of them.
        size: number of them.
        local_rank: of those on this host.
        local_size: how many those are.
        master_addr: address of the first one's host; empty if nobody says.
        master_port: port there.
    """

    source: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    master_addr: str = ""
    master_port: int = _PORT


def discover(environment: Mapping[str, str]) -> Place | None:
    """The place of this process; ``None`` if nothing tells.

    ``MASTER_ADDR`` and ``MASTER_PORT`` complete what the variables of others leave open.

    Raises:
        DrivetrainError: variables hold no numbers.
    """
    for find in (_kubeflow, _sagemaker, _azure, _slurm, _openmpi, _mvapich, _pmi):
        try:
            place = find(environment)
        except ValueError as error:
            who = find.__name__.removeprefix("_")
            raise DrivetrainError(f"variables of {who} make no sense: {error}") from error
        if place is not None:
            return place if place.master_addr else _completed(place, environment)
    return None


def _completed(place: Place, environment: Mapping[str, str]) -> Place:
    port = environment.get("MASTER_PORT", "")
    return replace(
        place,
        master_addr=environment.get("MASTER_ADDR", ""),
        master_port=int(port) if port.isdecimal() else place.master_port,
    )


def _kubeflow(env: Mapping[str, str]) -> Place | None:
    """Kubeflow Trainer starts one process in each pod, and torchrun's options as ``PET_*``."""
    if "PET_NODE_RANK" not in env or "PET_NNODES" not in env:
        return None
    return Place(
        "Kubeflow Trainer",
        int(env["PET_NODE_RANK"]),
        int(env["PET_NNODES"].rpartition(":")[2]),
        0,
        1,
        env.get("PET_MASTER_ADDR", ""),
        int(env.get("PET_MASTER_PORT", _PORT)),
    )


def _sagemaker(env: Mapping[str, str]) -> Place | None:
    """SageMaker starts one process on each host."""
    if "SM_HOSTS" not in env or "SM_CURRENT_HOST" not in env:
        return None
    hosts = sorted(json.loads(env["SM_HOSTS"]))
    return Place("SageMaker", hosts.index(env["SM_CURRENT_HOST"]), len(hosts), 0, 1, hosts[0])


def _azure(env: Mapping[str, str]) -> Place | None:
    """Azure ML starts by OpenMPI and says who the master is, or sets what PyTorch reads.

    The latter is its distribution ``pytorch``: with one process for each node, ``RANK`` and
    ``WORLD_SIZE`` count nodes.
    """
    if "AZUREML_RUN_ID" in env and "NODE_RANK" in env and "OMPI_COMM_WORLD_RANK" not in env:
        number = _reader(env, "")
        if number("LOCAL_RANK") or number("RANK") != number("NODE_RANK"):
            raise ValueError(
                "several processes on a node: set process_count_per_instance to 1, since each "
                "of them starts the ranks of its node"
            )
        place = Place("Azure ML", number("RANK"), number("WORLD_SIZE"), 0, 1)
        return _completed(place, env)
    if "AZ_BATCH_MASTER_NODE" in env:
        address, _, port = env["AZ_BATCH_MASTER_NODE"].partition(":")
        return _of_openmpi("Azure ML", env, address, int(port or _AZURE_PORT))
    if "AZ_BATCHAI_MPI_MASTER_NODE" in env:
        return _of_openmpi("Azure ML", env, env["AZ_BATCHAI_MPI_MASTER_NODE"], _AZURE_PORT)
    return None


def _openmpi(env: Mapping[str, str]) -> Place | None:
    return _of_openmpi("OpenMPI", env, "", _PORT) if "OMPI_COMM_WORLD_RANK" in env else None


def _of_openmpi(source: str, env: Mapping[str, str], address: str, port: int) -> Place:
    number = _reader(env, "OMPI_COMM_WORLD_")
    place = (number("RANK"), number("SIZE"), number("LOCAL_RANK"), number("LOCAL_SIZE"))
    return Place(source, *place, address, port)


def _mvapich(env: Mapping[str, str]) -> Place | None:
    if "MV2_COMM_WORLD_RANK" not in env:
        return None
    number = _reader(env, "MV2_COMM_WORLD_")
    place = (number("RANK"), number("SIZE"), number("LOCAL_RANK"), number("LOCAL_SIZE"))
    return Place("MVAPICH", *place)


def _pmi(env: Mapping[str, str]) -> Place | None:
    """MPICH and Intel MPI, also under Cray's launcher."""
    rank = env.get("PMI_RANK", env.get("PMIX_RANK"))
    size = env.get("PMI_SIZE")
    if rank is None or size is None:
        return None
    local = env.get("MPI_LOCALRANKID", env.get("PALS_LOCAL_RANKID", "0"))
    return Place("MPI", int(rank), int(size), int(local), int(env.get("MPI_LOCALNRANKS", "1")))


def _slurm(env: Mapping[str, str]) -> Place | None:
    """A step of ``srun``; in a batch script outside of one there is no place yet."""
    if "SLURM_PROCID" not in env or "SLURM_STEP_ID" not in env:
        return None
    rank, size = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
    local = int(env.get("SLURM_LOCALID", "0"))
    here = int(env.get("SLURM_NTASKS_PER_NODE", "1").partition("(")[0])
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", ""))
    return Place("Slurm", rank, size, local, here, first_slurm_host(nodes))


def first_slurm_host(nodes: str, names: Callable[[str], list[str]] | None = None) -> str:
    """The first host of a list as Slurm writes it, e.g. ``gpu[3-5,9]``.

    Args:
        nodes: the list; may be empty.
        names: expands it; ``scontrol show hostnames`` by default.
    """
    return (names or slurm_hosts)(nodes)[0] if nodes else ""


def slurm_hosts(nodes: str) -> list[str]:
    """All hosts of a list as Slurm writes it.

    Raises:
        DrivetrainError: Slurm's ``scontrol`` is not there or does not understand it.
    """
    if not any(sign in nodes for sign in "[,"):
        return [nodes]
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise DrivetrainError(f"{' '.join(command)} failed: {error}") from error
    return done.stdout.split()


def _reader(env: Mapping[str, str], prefix: str) -> Callable[[str], int]:
    def number(name: str) -> int:
        try:
            return int(env[prefix + name])
        except KeyError:
            raise ValueError(f"{prefix + name} is not set") from None

    return number
