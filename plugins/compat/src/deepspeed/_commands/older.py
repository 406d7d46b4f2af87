"""DeepSpeed's smaller commands, each over one of Drivetrain's: ``ds_elastic``, ``ds_ssh``, ..."""

from __future__ import annotations

import re
from pathlib import Path

import click

from drivetrain.cli import main as drivetrain

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


@click.command()
@click.option("-c", "--config", required=True, help="Config with a section elasticity.")
@click.option("-w", "--world-size", default=0, help="Number of ranks; 0 for all that fit.")
def elastic(config: str, world_size: int) -> None:
    """Show the batches of an elastic job, as `drivetrain elastic` does."""
    ranks = ["--world-size", str(world_size)] if world_size > 0 else []
    drivetrain.main(["elastic", config, *ranks], prog_name="ds_elastic")


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "-f", "--hostfile", default="/job/hostfile", show_default=True, help="Lines 'NAME slots=N'."
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def ssh(hostfile: str, command: tuple[str, ...]) -> None:
    """Run COMMAND on every host, as `drivetrain ssh` does."""
    if not Path(hostfile).is_file():
        raise click.ClickException(f"no hostfile {hostfile}; -f names one")
    drivetrain.main(["ssh", "--hostfile", hostfile, "--", *command], prog_name="ds_ssh")


@click.command()
@click.option("--folder", required=True, help="On the device that is measured.")
@click.option("--io_size", required=True, help="Bytes to move; K, M, G, T may follow.")
@click.option("--block_size", default="1M", help="Bytes of one request.")
@click.option("--queue_depth", default=32, help="Requests under way per thread.")
@click.option("--io_parallel", type=int, help="Threads that share a read or write.")
@click.option("--read", is_flag=True, help="Accepted: both directions are measured.")
@click.option("--loops", type=int, help="Accepted: time decides, not repetitions.")
def io(
    folder: str,
    io_size: str,
    block_size: str,
    queue_depth: int,
    io_parallel: int | None,
    **_: object,
) -> None:
    """Measure reads and writes with one setting, as `drivetrain bench io` does."""
    setting = ["--size", str(_count(io_size, "M")), "--block-size", str(_count(block_size, "K"))]
    setting += ["--queue-depth", str(queue_depth), "--threads", str(io_parallel or 1)]
    drivetrain.main(["bench", "io", folder, *setting], prog_name="ds_io")


@click.command()
@click.option("--nvme_dir", required=True, help="Folder on the device that is measured.")
@click.option("--io_size", default="400M", show_default=True, help="Bytes to move.")
@click.option("--log_dir", help="Accepted: results are printed.")
@click.option("--no_read", is_flag=True, help="Accepted: both directions are measured.")
@click.option("--no_write", is_flag=True, help="Accepted: both directions are measured.")
@click.option("--no_sudo", is_flag=True, help="Accepted: nothing needs it.")
@click.option("--loops", type=int, help="Accepted: time decides, not repetitions.")
@click.option("--verbose", is_flag=True, help="Accepted, has no effect.")
def nvme_tune(nvme_dir: str, io_size: str, **_: object) -> None:
    """Find the best section aio for a disk, as `drivetrain bench io` does."""
    size = ["--size", str(_count(io_size, "M"))]
    drivetrain.main(["bench", "io", nvme_dir, *size], prog_name="ds_nvme_tune")


@click.command()
@click.option("--num_gpus", type=int, help="Ranks to start here; those of the launcher without.")
@click.option("--all-reduce", is_flag=True, help="Measure all-reduce.")
@click.option("--all-gather", is_flag=True, help="Measure all-gather.")
@click.option("--all-to-all", is_flag=True, help="Measure all-to-all.")
@click.option("--broadcast", is_flag=True, help="Measure broadcast.")
@click.option("--pt2pt", is_flag=True, help="Measure messages from each rank to the next.")
@click.option("--scan", is_flag=True, help="Measure sizes up to the largest, not it alone.")
@click.option("--maxsize", default=24, show_default=True, help="Largest size, a power of two.")
@click.option("--dtype", default="float", show_default=True, help="float, bfloat16 or half.")
@click.option("--trials", type=int, help="Accepted: time decides, not repetitions.")
@click.option("--warmups", type=int, help="Accepted, has no effect.")
@click.option("--bw-unit", help="Accepted: bandwidths are in GB/s.")
@click.option("--backend", help="Accepted: the accelerator's backend is measured.")
@click.option("--async-op", is_flag=True, help="Accepted: calls are waited for.")
@click.option("--raw", is_flag=True, help="Accepted, has no effect.")
def comm(num_gpus: int | None, scan: bool, maxsize: int, dtype: str, **given: object) -> None:
    """Measure collectives, as `drivetrain bench comm` does."""
    dtypes = {"float": "fp32", "float32": "fp32", "bfloat16": "bf16", "half": "fp16"}
    known = {"float16": "fp16", **dtypes, **{name: name for name in dtypes.values()}}
    name = dtype.removeprefix("torch.")
    if name not in known:
        raise click.BadParameter(f"{dtype!r} is none of {', '.join(known)}", param_hint="--dtype")
    largest = str(1 << maxsize)
    words = ["--dtype", known[name], "--largest", largest]
    words += [] if scan else ["--smallest", largest]
    for kind in ("all_reduce", "all_gather", "all_to_all", "broadcast", "pt2pt"):
        if given[kind]:
            words += ["--op", "send_receive" if kind == "pt2pt" else kind]
    if num_gpus is not None:
        words += ["--ranks", str(num_gpus)]
    drivetrain.main(["bench", "comm", *words], prog_name="ds_bench")


def _count(text: str, unit: str) -> int:
    """Bytes such as ``400M`` in units of 2^10 or 2^20, rounded up.

    Raises:
        click.BadParameter: it is no number of bytes.
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text.upper())
    if match is None:
        raise click.BadParameter(f"{text!r} is no number of bytes such as 400M")
    number = int(match[1]) << _UNITS[match[2]]
    return max(1, -(-number // (1 << _UNITS[unit])))
