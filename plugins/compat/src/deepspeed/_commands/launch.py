"""``deepspeed SCRIPT ...``: this host by ``drivetrain run``, several by ``drivetrain launch``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from drivetrain.cli import main as drivetrain
from drivetrain.errors import DrivetrainError

DEEPSPEED_ENVIRONMENT_NAME = ".deepspeed_env"
"""File of ``NAME=value`` lines in the home folder or here, whose variables ranks get."""

EXPORT_ENVS = ["MLFLOW", "NCCL", "PYTHON", "MV2", "UCX"]
"""Beginnings of the names of variables that DeepSpeed sends to other hosts."""

DEFAULT_HOSTFILE = Path("/job/hostfile")

_PORT = 29500

_CONFIG_OPTIONS = ("--deepspeed_config", "--deepspeed", "--ds_config")
"""Options of scripts that take the config."""

_LOCAL = ("localhost", "127.0.0.1", "worker-0")


@dataclass(frozen=True)
class Options:
    """The options of the command; its help says what they mean."""

    hostfile: Path | None
    include: str
    exclude: str
    num_nodes: int
    num_gpus: int
    min_elastic_nodes: int
    max_elastic_nodes: int
    elastic_training: bool
    master_addr: str
    master_port: int | None
    node_rank: int
    no_ssh: bool
    no_ssh_check: bool
    ssh_port: int | None
    launcher: str | None
    launcher_args: str
    module: bool
    no_local_rank: bool
    no_python: bool
    force_multi: bool
    save_pid: bool
    enable_each_rank_log: str | None
    bind_cores_to_rank: bool
    bind_core_list: str
    venv_script: str
    log_level: str
    quiet: bool
    autotuning: str | None
    script: str
    arguments: tuple[str, ...]

    @property
    def target(self) -> list[str]:
        """What every rank runs."""
        kind = "module" if self.module else "script"
        passed = "0" if self.no_local_rank else "1"
        own = ["-m", "deepspeed._commands.rank", kind, passed]
        return [*own, self.script, *self.arguments]

    @property
    def common(self) -> list[str]:
        """What both commands of Drivetrain take."""
        found = (
            [] if self.enable_each_rank_log is None else ["--log-dir", self.enable_each_rank_log]
        )
        found += ["--bind-cores"] if self.bind_cores_to_rank or self.bind_core_list else []
        return found + (["--core-list", self.bind_core_list] if self.bind_core_list else [])


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="Other options of DeepSpeed's launcher are refused by name.",
)
@click.option("-H", "--hostfile", type=click.Path(path_type=Path), help="Lines 'NAME slots=N'.")
@click.option("-i", "--include", default="", help="Hosts and devices: NAME[:0,2][@NAME...].")
@click.option("-e", "--exclude", default="", help="Those that are left out.")
@click.option("--num_nodes", default=-1, help="The first so many hosts.")
@click.option("--num_gpus", "--num_accelerators", default=-1, help="Ranks of each host.")
@click.option("--min_elastic_nodes", default=-1, help="Fewest hosts of an elastic job.")
@click.option("--max_elastic_nodes", default=-1, help="Most hosts of an elastic job.")
@click.option("--elastic_training", is_flag=True, help="Go on with the hosts that are left.")
@click.option("--master_addr", default="", help="Address of the first host.")
@click.option("--master_port", type=int, help="Of the rendezvous.")
@click.option("--node_rank", default=-1, help="This host's place, with --no_ssh.")
@click.option("--no_ssh", is_flag=True, help="Every host runs this command by itself.")
@click.option("--no_ssh_check", is_flag=True, help="Without effect: nothing is probed.")
@click.option("--ssh_port", type=int, help="Port of the hosts' ssh servers.")
@click.option("--launcher", help="pdsh, openmpi, mpich, impi, slurm or mvapich; default: ssh.")
@click.option("--launcher_args", default="", help="Further arguments of that program.")
@click.option("--module", is_flag=True, help="SCRIPT is the name of a module.")
@click.option("--no_local_rank", is_flag=True, help="Do not pass --local_rank=N to SCRIPT.")
@click.option("--no_python", is_flag=True, help="Refused: SCRIPT must be Python.")
@click.option("--force_multi", is_flag=True, help="Start one host as if there were several.")
@click.option("--save_pid", is_flag=True, help="Without effect; the run folder has the ranks.")
@click.option("--enable_each_rank_log", metavar="DIR", help="Run folder; default: under runs/.")
@click.option("--bind_cores_to_rank", is_flag=True, help="Give each rank cores of its own.")
@click.option("--bind_core_list", default="", help="Cores to share out: 0-15,32-47.")
@click.option("--venv_script", default="", help="Script that hosts source first.")
@click.option("--log_level", default="info", help="Without effect.")
@click.option("-q", "--quiet", is_flag=True, help="Without effect.")
@click.option(
    "--autotuning",
    type=click.Choice(["tune", "run"]),
    help="Find the fastest config (drivetrain tune), and run SCRIPT with it.",
)
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(**options: Any) -> None:
    """Run SCRIPT with its ARGUMENTS on several ranks, of this host or of those in a hostfile."""
    chosen = Options(**options)
    if max(chosen.num_nodes, chosen.num_gpus) > 0 and (chosen.include or chosen.exclude):
        raise click.ClickException(
            "--num_nodes and --num_gpus count from the first host and device; they cannot be given "
            "together with --include or --exclude, which name them"
        )
    if chosen.no_python:
        raise click.ClickException("--no_python is not supported: SCRIPT must be Python")
    if not chosen.module and not Path(chosen.script).is_file():
        raise click.ClickException(
            f"script {chosen.script!r} does not exist (looked in {Path.cwd()})"
        )
    hostfile = chosen.hostfile
    if hostfile is None and DEFAULT_HOSTFILE.is_file():
        hostfile = DEFAULT_HOSTFILE
    if chosen.autotuning is not None:
        _succeed(_tuning(chosen, hostfile))
        return
    if chosen.no_ssh:
        command = _one_of_many(chosen)
    elif hostfile is not None and (chosen.force_multi or len(_hosts(hostfile)) > 1):
        command = _many(chosen, hostfile)
    else:
        command = _here(chosen, hostfile)
    _succeed([*command, *chosen.common, *chosen.target])


def run(args: Sequence[str] | None = None) -> None:
    """The command as a function, for scripts that start ranks themselves.

    Args:
        args: of the command; by default those of this process, which then ends as the command does.

    Raises:
        ValueError: ``args`` are wrong.
        SystemExit: the ranks fail, or cannot be started.
    """
    try:
        main.main(args, prog_name="deepspeed", standalone_mode=args is None)
    except click.ClickException as error:
        raise ValueError(error.format_message()) from error


def _succeed(command: list[str]) -> None:
    """Run a command of Drivetrain, which shows its errors, and go on after it unless it fails.

    Raises:
        SystemExit: it fails; with its status.
    """
    try:
        drivetrain.main(command, prog_name="deepspeed")
    except SystemExit as end:
        if end.code:
            raise


def _here(options: Options, hostfile: Path | None) -> list[str]:
    """The command for this host alone."""
    named = options.master_addr and options.master_addr not in (*_LOCAL, os.uname().nodename)
    if options.num_nodes > 1 or options.force_multi or named:
        raise click.ClickException(
            "several hosts need a hostfile (--hostfile), or --no_ssh with --node_rank on each"
        )
    devices = _devices(options.include, options.exclude, hostfile)
    ranks = options.num_gpus if options.num_gpus > 0 else devices
    _read_environment()
    command = ["run", "--nproc", "auto" if ranks is None else str(ranks)]
    return command + ([] if options.master_port is None else _port(options))


def _tuning(options: Options, hostfile: Path | None) -> list[str]:
    """The command that tries configs on this host."""
    if options.no_ssh or (hostfile is not None and len(_hosts(hostfile)) > 1):
        raise click.ClickException("--autotuning tries configs on one host; give no others")
    command = _here(options, hostfile)
    ranks = command[command.index("--nproc") + 1]
    if ranks == "auto":
        raise click.ClickException("--autotuning needs --num_gpus, the number of ranks of a trial")
    words = [*options.target]
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in _CONFIG_OPTIONS:
            continue
        config = value if equals else next(iter(words[place + 1 :]), "")
        if not Path(config).is_file():
            continue  # as in `--deepspeed --deepspeed_config FILE`
        if equals:
            words[place] = f"{name}={{config}}"
        else:
            words[place + 1] = "{config}"
        run = ["--run"] if options.autotuning == "run" else []
        return ["tune", "--nproc", ranks, *run, "--", config, *words]
    raise click.ClickException(
        f"--autotuning: none of {', '.join(_CONFIG_OPTIONS)} in the script's arguments is followed "
        "by a config file"
    )


def _one_of_many(options: Options) -> list[str]:
    """The command for this host, where each host runs its own."""
    if options.node_rank < 0 or options.num_nodes < 1 or not options.master_addr:
        raise click.ClickException("--no_ssh needs --node_rank, --num_nodes and --master_addr")
    _read_environment()
    ranks = "auto" if options.num_gpus < 1 else str(options.num_gpus)
    return [
        *("run", "--nproc", ranks, "--nnodes", str(options.num_nodes)),
        *("--node-rank", str(options.node_rank), "--master-addr", options.master_addr),
        *_port(options),
    ]


def _many(options: Options, hostfile: Path) -> list[str]:
    """The command that starts all hosts of a hostfile."""
    if options.elastic_training and not options.master_addr:
        raise click.ClickException("--elastic_training needs --master_addr")
    least = max(options.min_elastic_nodes, 1)
    most = options.max_elastic_nodes if options.max_elastic_nodes > 0 else len(_hosts(hostfile))
    elastic = ["--elastic", f"{least}:{most}", "--max-restarts", "100"]
    given = {
        "--include": options.include,
        "--exclude": options.exclude,
        "--num-nodes": options.num_nodes if options.num_nodes > 0 else None,
        "--num-gpus": options.num_gpus if options.num_gpus > 0 else None,
        "--master-addr": options.master_addr,
        "--ssh-port": options.ssh_port,
        "--launcher": options.launcher,
        "--launcher-args": options.launcher_args,
        "--setup": f"source {options.venv_script}" if options.venv_script else None,
    }
    return [
        *("launch", "--hostfile", str(hostfile), *_port(options)),
        *(part for name, value in given.items() if value for part in (name, str(value))),
        *(elastic if options.elastic_training else []),
    ]


def _port(options: Options) -> list[str]:
    return ["--master-port", str(_PORT if options.master_port is None else options.master_port)]


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
        raise click.ClickException(
            f"{text!r} names other hosts than this one; they need a hostfile (--hostfile)"
        )
    found = [number.strip() for number in numbers.split(",")]
    if not all(number.isdecimal() for number in found):
        raise click.ClickException(f"devices are given as localhost:0,2, got {text!r}")
    return [int(number) for number in found]


def _slots(hostfile: Path | None) -> int | None:
    """Slots of the one host of a hostfile."""
    if hostfile is None:
        return None
    hosts = _hosts(hostfile)
    number = hosts[0][-1].partition("slots=")[2] if hosts else ""
    if not number.isdecimal() or int(number) < 1:
        raise click.ClickException(f"hostfile {hostfile}: expected a line `host slots=N`")
    return int(number)


def _hosts(hostfile: Path) -> list[list[str]]:
    """The words of each line that names a host; ``drivetrain launch`` says what is wrong in it."""
    try:
        lines = hostfile.read_text("utf-8").splitlines()
    except OSError as error:
        raise click.ClickException(f"hostfile {hostfile}: {error.strerror}") from error
    return [line.split("#")[0].split() for line in lines if line.split("#")[0].strip()]


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
