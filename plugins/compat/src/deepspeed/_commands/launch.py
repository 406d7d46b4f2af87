"""``deepspeed SCRIPT ...`` on one host, over ``drivetrain run``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from drivetrain.cli import main as drivetrain
from drivetrain.errors import DrivetrainError

DEEPSPEED_ENVIRONMENT_NAME = ".deepspeed_env"
"""File of ``NAME=value`` lines in the home folder or here, whose variables ranks get."""

EXPORT_ENVS = ["MLFLOW", "NCCL", "PYTHON", "MV2", "UCX"]
"""Beginnings of the names of variables that DeepSpeed sends to other hosts."""

_HOSTS = "several hosts are not served by this command yet; start `drivetrain run` on each of them"

_LOCAL = ("localhost", "127.0.0.1", "worker-0")


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="Other options of DeepSpeed's launcher are refused by name.",
)
@click.option("-H", "--hostfile", type=click.Path(path_type=Path), help="Of one host.")
@click.option("-i", "--include", default="", help="Devices: localhost:0,2.")
@click.option("-e", "--exclude", default="", help="Devices that are left out: localhost:1.")
@click.option("--num_nodes", default=1, help="Must be 1.")
@click.option("--num_gpus", "--num_accelerators", default=-1, help="Ranks; default: one a device.")
@click.option("--master_addr", default="", help="Must be this host.")
@click.option("--master_port", type=int, help="Of the rendezvous; default: a free one.")
@click.option("--launcher", default="pdsh", help="Without effect on one host.")
@click.option("--launcher_args", default="", help="Without effect on one host.")
@click.option("--module", is_flag=True, help="SCRIPT is the name of a module.")
@click.option("--no_local_rank", is_flag=True, help="Do not pass --local_rank=N to SCRIPT.")
@click.option("--no_python", is_flag=True, help="Refused: SCRIPT must be Python.")
@click.option("--force_multi", is_flag=True, help="Refused: there is one host.")
@click.option("--save_pid", is_flag=True, help="Without effect; the run folder has the ranks.")
@click.option("--enable_each_rank_log", metavar="DIR", help="Run folder; default: under runs/.")
@click.option("--bind_cores_to_rank", is_flag=True, help="Without effect: drivetrain-cpu binds.")
@click.option("--log_level", default="info", help="Without effect.")
@click.option("-q", "--quiet", is_flag=True, help="Without effect.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(
    hostfile: Path | None,
    include: str,
    exclude: str,
    num_nodes: int,
    num_gpus: int,
    master_addr: str,
    master_port: int | None,
    module: bool,
    no_local_rank: bool,
    no_python: bool,
    force_multi: bool,
    enable_each_rank_log: str | None,
    script: str,
    arguments: tuple[str, ...],
    **_: object,
) -> None:
    """Run SCRIPT with its ARGUMENTS on several ranks of this host, as `drivetrain run` does."""
    if num_nodes > 1 or force_multi:
        raise click.ClickException(_HOSTS)
    if no_python:
        raise click.ClickException("--no_python is not supported: SCRIPT must be Python")
    if master_addr and master_addr not in (*_LOCAL, os.uname().nodename):
        raise click.ClickException(_HOSTS)
    if not module and not Path(script).is_file():
        raise click.ClickException(f"script {script!r} does not exist (looked in {Path.cwd()})")
    devices = _devices(include, exclude, hostfile)
    ranks = num_gpus if num_gpus > 0 else devices
    _read_environment()
    command = ["run", "--nproc", "auto" if ranks is None else str(ranks)]
    command += [] if master_port is None else ["--master-port", str(master_port)]
    command += [] if enable_each_rank_log is None else ["--log-dir", enable_each_rank_log]
    kind = "module" if module else "script"
    own = ["-m", "deepspeed._commands.rank", kind, "0" if no_local_rank else "1"]
    drivetrain.main([*command, *own, script, *arguments], prog_name="deepspeed")


def _devices(include: str, exclude: str, hostfile: Path | None) -> int | None:
    """Number of ranks that the device filters leave; ``None`` where there are none.

    The devices are selected with ``CUDA_VISIBLE_DEVICES``.
    """
    if include and exclude:
        raise click.ClickException("--include and --exclude cannot be given together")
    slots = _slots(hostfile)
    if include:
        chosen = _numbers(include)
    elif exclude:
        if slots is None:
            raise click.ClickException("--exclude needs a hostfile, which tells how many there are")
        chosen = [n for n in range(slots) if n not in _numbers(exclude)]
    else:
        return slots
    if not chosen:
        raise click.ClickException("no device is left")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, chosen))
    return len(chosen)


def _numbers(text: str) -> list[int]:
    """Devices of ``host:0,1``."""
    host, _, numbers = text.partition(":")
    if "@" in text or host not in (*_LOCAL, os.uname().nodename):
        raise click.ClickException(f"{text!r} names other hosts than this one: {_HOSTS}")
    found = [number.strip() for number in numbers.split(",")]
    if not all(number.isdecimal() for number in found):
        raise click.ClickException(f"devices are given as localhost:0,2, got {text!r}")
    return [int(number) for number in found]


def _slots(hostfile: Path | None) -> int | None:
    """Slots of the one host of a hostfile."""
    if hostfile is None:
        return None
    try:
        lines = hostfile.read_text("utf-8").splitlines()
    except OSError as error:
        raise click.ClickException(f"hostfile {hostfile}: {error.strerror}") from error
    hosts = [line.split("#")[0].split() for line in lines if line.split("#")[0].strip()]
    if len(hosts) != 1:
        raise click.ClickException(f"hostfile {hostfile} names {len(hosts)} hosts: {_HOSTS}")
    number = hosts[0][-1].partition("slots=")[2]
    if not number.isdecimal() or int(number) < 1:
        raise click.ClickException(f"hostfile {hostfile}: expected a line `host slots=N`")
    return int(number)


def _read_environment() -> None:
    """Set the variables of :data:`DEEPSPEED_ENVIRONMENT_NAME`."""
    named = os.environ.get("DS_ENV_FILE")
    places = [Path(named)] if named else [Path.home() / DEEPSPEED_ENVIRONMENT_NAME]
    places += [] if named else [Path(DEEPSPEED_ENVIRONMENT_NAME)]
    for place in places:
        if not place.is_file():
            continue
        for number, line in enumerate(place.read_text("utf-8").splitlines(), 1):
            name, equals, value = line.strip().partition("=")
            if line.strip() and not line.lstrip().startswith("#"):
                if not equals:
                    raise DrivetrainError(f"{place}, line {number}: expected NAME=value")
                os.environ[name.strip()] = value.strip()
