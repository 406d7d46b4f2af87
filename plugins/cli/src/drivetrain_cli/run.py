"""``drivetrain run``: one machine's ranks through torchrun, or this machine's part of several."""

from __future__ import annotations

import importlib.util
import os
import platform
import signal
import sys
import time
from pathlib import Path

import click

from drivetrain.cli import UserPath
from drivetrain.errors import DrivetrainError
from drivetrain.plan.registry import Registry


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--nproc", default="auto", help="Ranks on this machine; default: one per device.")
@click.option("--nnodes", default="1", show_default=True, help="Machines, or MIN:MAX.")
@click.option("--node-rank", default=0, show_default=True, help="This machine's place among them.")
@click.option("--master-addr", default="127.0.0.1", show_default=True, help="First machine.")
@click.option("--master-port", type=int, help="Port of the first machine; default: a free one.")
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where machines meet in any order.")
@click.option("--rdzv-id", default="drivetrain", show_default=True, help="Name of the job there.")
@click.option(
    "--grace",
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Time that ranks have to end after a signal; then they are killed.",
)
@click.option("--max-restarts", default=0, show_default=True, help="Restarts after a failure.")
@click.option("--spare", is_flag=True, help="Start ranks as copies of a process with torch loaded.")
@click.option("--log-dir", type=UserPath(path_type=Path), help="Run folder; default: under runs/.")
@click.option("--bind-cores", is_flag=True, help="Give each rank cores of its own.")
@click.option("--core-list", default="", metavar="LIST", help="Cores to share out: 0-15,32-47.")
@click.option(
    "--failure-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="How a failure is said; json is for programs that start several machines.",
)
@click.option("-m", "--module", is_flag=True, help="SCRIPT is the name of a module.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(
    nproc: str,
    nnodes: str,
    node_rank: int,
    master_addr: str,
    master_port: int | None,
    rdzv_endpoint: str | None,
    rdzv_id: str,
    grace: float,
    max_restarts: int,
    spare: bool,
    log_dir: Path | None,
    bind_cores: bool,
    core_list: str,
    failure_format: str,
    module: bool,
    script: str,
    arguments: tuple[str, ...],
) -> None:
    """Run SCRIPT with its ARGUMENTS on several ranks.

    The first rank's output is shown; the output of every rank is kept in the run folder. When a
    rank fails, the others are ended and the first failure is shown.
    """
    from drivetrain_cli.cores import core_variables
    from drivetrain_cli.failures import explain_failure
    from drivetrain_cli.launch import run_agent
    from drivetrain_cli.nodes import Nodes
    from drivetrain_cli.rank import FIRST_LOG

    nodes = Nodes(nnodes, node_rank, master_addr, master_port, rdzv_endpoint, rdzv_id, max_restarts)
    meeting = nodes.arguments()
    (_check_module if module else _check_script)(script)
    ranks = _ranks(nproc)
    nodes.check_port()
    folder = _run_folder(log_dir, script, alone=nodes.alone)
    kind = "module" if module else "script"
    worker = ["--module", f"drivetrain_cli.{_start(spare)}", kind, script, *arguments]
    # Without a folder of its own torchrun leaves one in the system's temporary folder at every run.
    own = ["--nproc-per-node", str(ranks), "--log-dir", str(folder / "torchrun")]
    command = [sys.executable, "-m", "drivetrain_cli.agent", str(folder), *meeting, *own, *worker]
    environment = _environment(ranks, nodes.interface(), folder, spare=spare)
    if bind_cores or core_list:
        environment |= core_variables(ranks, core_list)
    code = run_agent(command, environment, folder / FIRST_LOG, grace)
    if code > 128:
        how = signal.Signals(code - 128).name
        click.secho(f"interrupted by {how}; the logs are in {folder}", fg="yellow", err=True)
        sys.exit(code)
    if code:
        failure = explain_failure(folder, ranks)
        if failure_format == "text":
            raise failure.error()
        click.echo(failure.json(), err=True)
        sys.exit(2)


def _environment(ranks: int, interface: str, folder: Path, *, spare: bool) -> dict[str, str]:
    """Our own, with what ranks need where the user has not set it."""
    from drivetrain_cli.rank import FOLDER_VARIABLE

    environment = {**os.environ, FOLDER_VARIABLE: str(folder)}
    if spare:
        environment |= _spare_variables()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    if interface:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    return environment


def _start(spare: bool) -> str:
    """The module that torchrun starts for a rank."""
    return "warm_rank" if spare else "rank"


def _spare_variables() -> dict[str, str]:
    """What makes the agent start a spare.

    Raises:
        DrivetrainError: this system cannot have one.
    """
    from drivetrain_cli.agent import WANTED

    if not hasattr(os, "pidfd_open"):
        raise DrivetrainError("--spare needs a system with descriptors of processes (Linux)")
    return {WANTED: "1"}


def _ranks(nproc: str) -> int:
    if nproc == "auto":
        accelerators = Registry.installed().names("accelerators")
        return max([1, *(_devices(name) for name in accelerators)])
    if not nproc.isdecimal() or int(nproc) < 1:
        raise DrivetrainError(f"--nproc takes a positive number or auto, got {nproc!r}")
    ranks, cores = int(nproc), _cores()
    if ranks > cores:
        message = f"warning: {ranks} ranks share {cores} cores, so they slow each other down"
        click.secho(message, fg="yellow", err=True)
    return ranks


def _devices(name: str) -> int:
    accelerator = Registry.installed().load("accelerators", name)()
    return 0 if accelerator.probe() else int(accelerator.device_count())


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_script(script: str) -> None:
    """Find out before any rank starts what would fail on every rank.

    Raises:
        DrivetrainError: there is no such file, it cannot be read, or it is not valid Python.
    """
    path = Path(script)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DrivetrainError(f"script {script!r} {what} (looked in {Path.cwd()})")
    try:
        compile(path.read_bytes(), script, "exec")
    except OSError as error:
        raise DrivetrainError(f"script {script!r} cannot be read: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:
        raise DrivetrainError(_syntax_message(script, error)) from error


def _syntax_message(script: str, error: SyntaxError | ValueError) -> str:
    if not isinstance(error, SyntaxError):
        return f"script {script!r} is not Python: {error}"
    text = (error.text or "").rstrip("\n")
    blank = len(text) - len(text.lstrip())
    marker = " " * max(0, (error.offset or 1) - 1 - blank) + "^"
    excerpt = f"\n    {text.strip()}\n    {marker}" if text.strip() else ""
    return f"{script}, line {error.lineno}: syntax error: {error.msg}{excerpt}"


def _check_module(name: str) -> None:
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise DrivetrainError(f"module {name!r} cannot be found: {error}") from error
    finally:
        sys.path.pop(0)
    if found is None:
        raise DrivetrainError(f"module {name!r} does not exist; a file is given without --module")


def _run_folder(wish: Path | None, script: str, *, alone: bool) -> Path:
    """A folder of its own for the logs of this run.

    Raises:
        DrivetrainError: it cannot be made, or already holds the logs of another run.
    """
    from drivetrain_cli.rank import FIRST_LOG

    stem = Path(script).stem if script.endswith(".py") else script
    host = "" if alone else f"-{platform.node()}"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = (wish or Path("runs", f"{stamp}-{stem}-{os.getpid()}{host}")).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.glob("rank*")) or (folder / FIRST_LOG).exists()
        (folder / FIRST_LOG).touch(exist_ok=True)
    except OSError as error:
        raise DrivetrainError(
            f"run folder {folder} cannot be written: {error.strerror}; choose another with "
            "--log-dir"
        ) from error
    if used:
        raise DrivetrainError(f"run folder {folder} holds the logs of another run; choose another")
    return folder
