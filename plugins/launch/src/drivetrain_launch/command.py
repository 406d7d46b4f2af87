"""``drivetrain launch``: a script on the ranks of several hosts."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drivetrain.cli import UserPath
from drivetrain.errors import DrivetrainError
from drivetrain.wording import did_you_mean
from drivetrain_launch.hosts import Host, choose, read_hostfile

if TYPE_CHECKING:
    from drivetrain_launch.launchers.base import Launcher
    from drivetrain_launch.watch import Outcome
    from drivetrain_launch.world import World

DEFAULT_HOSTFILE = Path("/job/hostfile")

_SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@dataclass(frozen=True)
class Options:
    """The options of ``drivetrain launch``; the command's help says what they mean."""

    hostfile: Path | None
    include: str
    exclude: str
    num_nodes: int | None
    num_gpus: int | None
    launcher: str | None
    launcher_args: str
    master_addr: str | None
    master_port: int
    ssh_port: int | None
    export: tuple[str, ...]
    setup: str
    python: str
    image: str
    accelerator: str
    elastic: str
    bind_cores: bool
    core_list: str
    grace: float
    max_restarts: int
    spare: bool
    log_dir: Path | None
    join: bool
    sbatch: Path | None
    dry_run: bool
    module: bool
    script: str
    arguments: tuple[str, ...]


@click.command(context_settings=_SETTINGS)
@click.option(
    "-H", "--hostfile", type=UserPath(path_type=Path), help="Lines 'NAME slots=N'. Default: none."
)
@click.option("-i", "--include", default="", help="Hosts to use: NAME[:SLOT,...][@NAME...].")
@click.option("-e", "--exclude", default="", help="Hosts and slots to leave out.")
@click.option("--num-nodes", type=int, help="Use the first so many hosts.")
@click.option("--num-gpus", type=int, help="Use the first so many slots of each host.")
@click.option("--launcher", help="ssh (default), pdsh, openmpi, slurm, ...; see the README.")
@click.option("--launcher-args", default="", help="Further arguments of the launcher's program.")
@click.option("--master-addr", help="Address of the first host. Default: its name.")
@click.option("--master-port", default=29500, show_default=True, help="Port there.")
@click.option("--ssh-port", type=int, help="Port of the hosts' ssh servers.")
@click.option("--export", multiple=True, metavar="NAME[=VALUE]", help="Variable to set on hosts.")
@click.option("--setup", default="", help="Shell command that comes first on every host.")
@click.option("--python", default=sys.executable, help="Interpreter on every host. Default: this.")
@click.option("--image", default="", help="Container image, for Kubernetes.")
@click.option("--accelerator", default="", help="Of the ranks; cpu asks no scheduler for GPUs.")
@click.option("--elastic", default="", metavar="MIN:MAX", help="Go on with so many hosts.")
@click.option("--bind-cores", is_flag=True, help="Give each rank cores of its own.")
@click.option("--core-list", default="", help="Cores to share out, such as 0-15,32-47.")
@click.option("--grace", default=30.0, show_default=True, help="Seconds to end after a signal.")
@click.option("--max-restarts", default=0, show_default=True, help="Restarts after a failure.")
@click.option("--spare", is_flag=True, help="Start ranks as copies of a process with torch loaded.")
@click.option("--log-dir", type=UserPath(path_type=Path), help="Run folder; default: under runs/.")
@click.option("--join", is_flag=True, help="Be one host of a job that a scheduler has started.")
@click.option("--sbatch", type=UserPath(path_type=Path), help="Write a batch script for Slurm.")
@click.option("--dry-run", is_flag=True, help="Show the commands instead of running them.")
@click.option("-m", "--module", is_flag=True, help="SCRIPT is the name of a module.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def launch(**options: Any) -> None:
    """Run SCRIPT with its ARGUMENTS on the ranks of several hosts.

    The hosts come from a hostfile, from Slurm's allocation, or (with --join) from whoever has
    started this command on every host. When a rank fails, all hosts are ended, and the first
    failure is shown with its host and rank.
    """
    chosen = Options(**options)
    if chosen.sbatch is not None:
        _write_batch_script(chosen, chosen.sbatch)
    elif chosen.join:
        _join(chosen)
    else:
        _launch(chosen)


def _launch(options: Options) -> None:
    from drivetrain_launch.watch import run_all

    hosts = find_hosts(options)
    name = options.launcher or ("slurm" if _in_allocation(options) else "ssh")
    launcher = make_launcher(name, options, hosts)
    world = make_world(options, hosts)
    launcher.check(world)
    logs = Path(world.logs)
    if options.dry_run:
        _show(launcher, world)
        return
    _make_folder(logs)
    outcome = run_all(launcher.starts(world), logs, options.grace)
    where = launcher.collect(world, logs)
    if outcome.signal:
        how = signal.Signals(outcome.signal).name
        click.secho(f"interrupted by {how}; the logs are in {where}", fg="yellow", err=True)
        sys.exit(128 + outcome.signal)
    if any(outcome.codes.values()):
        raise DrivetrainError(f"{explain(outcome, launcher)}\nlogs: {where}")


def find_hosts(options: Options) -> list[Host]:
    """The hosts that take part.

    Raises:
        DrivetrainError: the hostfile is wrong, or hosts and options do not fit.
    """
    path = options.hostfile
    if path is None and DEFAULT_HOSTFILE.is_file():
        path = DEFAULT_HOSTFILE
    if path is not None:
        found = read_hostfile(path)
    elif _in_allocation(options):
        found = _of_slurm(options.num_gpus)
    elif options.launcher in ("kubernetes", "ray"):
        count = 1 if options.num_nodes is None else options.num_nodes
        slots = tuple(range(options.num_gpus or 1))
        return [Host(f"node-{number}", slots) for number in range(count)]
    else:
        raise DrivetrainError(
            "no hosts: give --hostfile, or start inside of a Slurm allocation; on this machine "
            f"alone use 'drivetrain run' ({DEFAULT_HOSTFILE} does not exist)"
        )
    return choose(
        found,
        include=options.include,
        exclude=options.exclude,
        nodes=options.num_nodes,
        per_node=options.num_gpus,
    )


def _in_allocation(options: Options) -> bool:
    return options.launcher in (None, "slurm") and "SLURM_JOB_NODELIST" in os.environ


def _of_slurm(per_node: int | None) -> list[Host]:
    """The hosts of this allocation, with the devices that Slurm has given of each."""
    from drivetrain_launch.discovery import slurm_hosts

    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    slots = per_node or (int(given) if given.isdecimal() and int(given) else 1)
    return [
        Host(name, tuple(range(slots))) for name in slurm_hosts(os.environ["SLURM_JOB_NODELIST"])
    ]


def make_launcher(name: str, options: Options, hosts: list[Host]) -> Launcher:
    """The launcher of a name.

    Raises:
        DrivetrainError: there is none.
    """
    from importlib.metadata import entry_points

    from drivetrain_launch.launchers.base import Settings

    found = {entry.name: entry for entry in entry_points(group="drivetrain.launchers")}
    if name not in found:
        hint = did_you_mean(name, list(found))
        raise DrivetrainError(f"--launcher: none is named {name!r}{hint} (of {_all(found)})")
    settings = Settings(
        arguments=tuple(shlex.split(options.launcher_args)),
        ssh_port=options.ssh_port,
        python=options.python,
        setup=options.setup,
        named=options.export,
        image=options.image,
    )
    launcher: Launcher = found[name].load()(settings)
    return launcher


def _all(names: Any) -> str:
    return ", ".join(sorted(names))


def make_world(options: Options, hosts: list[Host]) -> World:
    """The description of the job that its hosts get."""
    from drivetrain_launch.world import World, own_versions

    folder = Path.cwd()
    logs = options.log_dir or Path("runs", f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    return World(
        hosts=tuple(hosts),
        master_addr=options.master_addr or hosts[0].name,
        master_port=options.master_port,
        folder=str(folder),
        logs=str(logs.absolute()),
        target=options.script,
        arguments=options.arguments,
        module=options.module,
        options=_run_options(options),
        variables=_variables(options, folder),
        nodes=options.elastic,
        versions=own_versions(),
    )


def _variables(options: Options, folder: Path) -> dict[str, str]:
    """Those that the hosts of a job get."""
    from drivetrain_launch.devices import ACCELERATOR
    from drivetrain_launch.variables import exported

    found = exported(os.environ, options.export, folder, Path.home())
    return {**found, ACCELERATOR: options.accelerator} if options.accelerator else found


def _run_options(options: Options) -> tuple[str, ...]:
    """Those that ``drivetrain run`` takes as well."""
    found = ["--grace", str(options.grace), "--max-restarts", str(options.max_restarts)]
    if options.spare:
        found.append("--spare")
    if options.bind_cores or options.core_list:
        found.append("--bind-cores")
    if options.core_list:
        found += ["--core-list", options.core_list]
    return tuple(found)


def explain(outcome: Outcome, launcher: Launcher) -> str:
    """The first failure, in the words of the host where it happened."""
    if outcome.failures:
        first = outcome.failures[0]
        return f"host {first.host}: {first.text}"
    who = next(who for who, code in outcome.codes.items() if code)
    return launcher.explain(who, outcome.codes[who], outcome.silent.get(who, []))


def _show(launcher: Launcher, world: World) -> None:
    click.echo(f"{len(world.hosts)} hosts, {world.size} ranks, logs in {world.logs}")
    for rank, host in enumerate(world.hosts):
        slots = ",".join(map(str, host.slots))
        click.echo(f"{host.name} (slots {slots}): {shlex.join(world.run_command(rank))}")
    for start in launcher.starts(world):
        click.echo(f"start {start.who}: {shlex.join(start.command)}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DrivetrainError(
            f"run folder {folder} cannot be made: {error.strerror}; choose another with --log-dir"
        ) from error


def _join(options: Options) -> None:
    """Become ``drivetrain run`` with what the variables of a scheduler say of this host."""
    from drivetrain_launch.devices import ACCELERATOR
    from drivetrain_launch.discovery import discover

    place = discover(os.environ)
    if place is None:
        raise DrivetrainError(
            f"--join: no variables on {platform.node()} tell of a job (looked for those of "
            "Kubeflow Trainer, SageMaker, Azure ML, Slurm and MPI)"
        )
    if place.size > 1 and not place.master_addr:
        raise DrivetrainError(
            f"--join: {place.source} does not say where the first host is; set MASTER_ADDR"
        )
    meeting = []
    if place.size > 1:
        meeting = ["--nnodes", str(place.size), "--node-rank", str(place.rank)]
        meeting += ["--master-addr", place.master_addr, "--master-port", str(place.master_port)]
    ranks = "auto" if options.num_gpus is None else str(options.num_gpus)
    logs = ["--log-dir", str(options.log_dir)] if options.log_dir is not None else []
    target = [*(["--module"] if options.module else []), options.script, *options.arguments]
    command = [sys.executable, "-m", "drivetrain.cli", "run", "--nproc", ranks, *meeting, *logs]
    command += [*_run_options(options), *target]
    if options.dry_run:
        click.echo(shlex.join(command))
        return
    if options.accelerator:
        os.environ[ACCELERATOR] = options.accelerator
    os.execv(command[0], command)  # noqa: S606 - no shell, as it should be


def _write_batch_script(options: Options, path: Path) -> None:
    from drivetrain_launch.devices import needs_devices
    from drivetrain_launch.launchers.slurm import batch_script

    if options.num_nodes is None:
        raise DrivetrainError("--sbatch needs --num-nodes: how many hosts to ask Slurm for")
    slots = options.num_gpus or 1
    command = ["--num-gpus", str(slots), "--master-port", str(options.master_port)]
    command += ["--accelerator", options.accelerator] if options.accelerator else []
    command += [part for wanted in options.export for part in ("--export", wanted)]
    command += [*_run_options(options), *(["--module"] if options.module else []), options.script]
    job = Path(options.script).stem
    text = batch_script(
        job,
        options.num_nodes,
        slots if needs_devices(_variables(options, Path.cwd())) else 0,
        [*command, *options.arguments],
        shlex.split(options.launcher_args),
        f"{job}-%j.log",
    )
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise DrivetrainError(f"{path} cannot be written: {error.strerror}") from error
    click.echo(f"wrote {path}; submit it with: sbatch {path}")
