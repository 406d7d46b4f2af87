"""``drivetrain report``: the environment, what works in it, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from drivetrain import __version__
from drivetrain.errors import DrivetrainError
from drivetrain.plan import known
from drivetrain.plan.registry import CORE, Entry, Registry
from drivetrain_cli.config import OVERLAY_OPTION
from drivetrain_cli.plugins import GROUPS
from drivetrain_cli.tables import show

if TYPE_CHECKING:
    from drivetrain.contracts import Accelerator

Rows = Iterator[tuple[str, str]]

_ADDS_TO_CPU = "drivetrain-cpu"
"""Takes the place of core's own CPU accelerator, so the table of accelerators tells of it."""


@click.command()
@click.option("--memory", is_flag=True, help="Where bytes live: what there is, what a job needs.")
@click.option("--config", metavar="FILE", help="Of the job, with --memory.")
@OVERLAY_OPTION
@click.option("--parameters", metavar="N", help="Size of its model: 7b, 125M, 1.3e9.")
@click.option("--model", metavar="MODULE:FUNCTION", help="What makes its model, instead of a size.")
@click.option("--layers", type=click.IntRange(1), help="Its blocks; default: usual for the size.")
@click.option("--hidden", type=click.IntRange(1), help="Its hidden size; default: likewise.")
@click.option("--sequence", type=click.IntRange(1), default=2048, show_default=True, help="Tokens.")
@click.option("--nproc", type=click.IntRange(1), help="Ranks on a machine; default: one a device.")
@click.option("--nnodes", type=click.IntRange(1), default=1, show_default=True, help="Machines.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "gpu"]),
    help="What ranks compute on; default: what a job gets here.",
)
def report(memory: bool, **job: Any) -> None:
    """Show system, torch, accelerators, plugins and kernels; what is missing and how to get it.

    It is about what a job would use here whose config names no accelerator.

    With --memory it shows how much memory of each kind this machine has. With --config as well,
    and the size of a model, it shows what each rank of that job would keep where, before it runs:
    bytes of the device, of the host, how many of these are page-locked, and of files.
    """
    if memory:
        from drivetrain_cli.memory_report import report_memory

        report_memory(MemoryRequest(**job), _chosen()[0])
        return
    given = [name for name in ("config", "parameters", "model") if job[name] is not None]
    if given:
        raise click.UsageError(f"--{given[0]} needs --memory")
    _show_all()


@dataclass(frozen=True)
class MemoryRequest:
    """The options of ``drivetrain report --memory``, as they were given."""

    config: str | None
    overlays: tuple[str, ...]
    parameters: str | None
    model: str | None
    layers: int | None
    hidden: int | None
    sequence: int
    nproc: int | None
    nnodes: int
    device: str | None


def _show_all() -> None:
    from rich.markup import escape
    from rich.table import Table

    from drivetrain.job.accelerator_choice import active

    registry = Registry.installed()
    accelerator, choice = _chosen()
    tables: list[tuple[str, Callable[[], Rows]]] = [
        ("system", _system),
        ("torch", _torch),
        ("accelerators", lambda: _accelerators(registry, choice)),
        *((entry.name, partial(_table, entry)) for entry in registry.entries("reports")),
        ("plugins", lambda: _plugins(registry)),
        ("from plugins", lambda: _contributed(registry)),
        ("not installed", lambda: _missing(registry)),
    ]
    with nullcontext() if accelerator is None else active(accelerator):
        for title, rows in tables:
            table = Table(title=title, title_justify="left", show_header=False)
            for label, value in rows():
                table.add_row(escape(label), escape(value))
            if table.row_count:
                show(table)


def _system() -> Rows:
    yield "Drivetrain", __version__
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", platform.platform()
    yield "processors", f"{os.cpu_count()} ({platform.machine()})"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        yield "memory", f"{memory / 2**30:.1f} GiB"
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    yield "C++ compiler", compiler or "none found; install one, or set CXX, to build native kernels"


def _torch() -> Rows:
    try:
        import torch
    except ImportError as error:
        yield "torch", f"cannot be imported: {error}; pip install torch"
        return
    yield "version", torch.__version__
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield "build", f"ROCm {torch.version.hip}" if torch.version.hip else build
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    yield "accelerator seen by torch", str(device.type) if device else "none"
    backends = ("gloo", "nccl", "mpi", "ucc", "xccl")
    usable = [b for b in backends if torch.distributed.is_backend_available(b)]
    yield "collectives", ", ".join(usable)
    yield "threads", str(torch.get_num_threads())


def _chosen() -> tuple[Accelerator | None, str]:
    """The accelerator that a job gets here, and its name or why there is none."""
    from drivetrain.job.accelerator_choice import choose_accelerator

    try:
        accelerator = choose_accelerator()
    except DrivetrainError as error:
        return None, str(error)
    return accelerator, accelerator.name


def _accelerators(registry: Registry, choice: str) -> Rows:
    yield "in use", choice
    entries = registry.entries("accelerators")
    for entry in entries:
        owner = f"{entry.name} ({entry.distribution} {entry.version})"
        try:
            reason = entry.load()().probe()
        except DrivetrainError as error:
            reason = str(error)
        yield owner, f"not usable: {reason}" if reason else "usable"
    if not any(entry.name == "cpu" for entry in entries):
        more = f"{_ADDS_TO_CPU} adds bound cores, shared memory and native kernels"
        yield f"cpu (drivetrain {__version__})", f"usable, with plain torch; pip install {more}"


def _plugins(registry: Registry) -> Rows:
    owned: dict[str, list[str]] = {}
    for entry in registry.entries("plugins"):
        if entry.distribution != CORE:
            owned.setdefault(f"{entry.distribution} {entry.version}", []).append(entry.name)
    for owner, paths in sorted(owned.items()):
        yield owner, ", ".join(paths)


def _contributed(registry: Registry) -> Rows:
    """What plugins and accelerators say of themselves; one that fails costs its own rows only."""
    from drivetrain.plan.hub import Hub

    entries = [*registry.entries("plugins"), *registry.entries("accelerators")]
    for entry in {entry.value: entry for entry in entries}.values():
        try:
            kind = entry.load()
            hub = Hub()
            hub.register(kind({}) if entry.group == "plugins" else kind(), entry.name)
            yield from hub.report_rows()
        except DrivetrainError as error:
            yield entry.label, str(error)


def _table(entry: Entry) -> Rows:
    """What a distribution reports under a title of its own; if it fails, why."""
    try:
        yield from entry.load()()
    except DrivetrainError as error:
        yield entry.label, str(error)


def _missing(registry: Registry) -> Rows:
    served = {**known.SECTIONS, **known.OWNERS["optimizers"]}
    present = {e.distribution for group in GROUPS for e in registry.entries(group)}
    wanted = set(served.values()) - known.PLANNED - present
    for distribution in sorted(wanted - {_ADDS_TO_CPU}):
        names = sorted(name for name, owner in served.items() if owner == distribution)
        yield ", ".join(names), f"pip install {distribution}"
