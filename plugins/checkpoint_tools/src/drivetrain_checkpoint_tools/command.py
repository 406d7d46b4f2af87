"""``drivetrain checkpoint``: look at checkpoints, compare them, and take them elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from drivetrain.wording import printable

TAG_OPTION = click.option("--tag", help="Which checkpoint of the folder; default: the latest.")
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def checkpoint() -> None:
    """Verify, inspect, compare, export and import checkpoints.

    A checkpoint is given by its own folder, or by its run's folder and --tag; folders may be URLs
    such as s3://bucket/run.
    """


@checkpoint.command()
@click.argument("folder")
@TAG_OPTION
def verify(folder: str, tag: str | None) -> None:
    """Read every byte of a checkpoint and compare it with its checksum.

    Exit code 1 when something is wrong.
    """
    from drivetrain.checkpoint.opening import opened
    from drivetrain_checkpoint_tools.verification import verify as check

    with opened(folder, tag) as stored:
        problems = check(stored)
        for problem in problems:
            click.secho(problem, fg="red")
        if problems:
            raise SystemExit(1)
        count = len(stored.keys)
        click.secho(f"{stored.place} is whole: {count} tensors of {stored.world_size} ranks")


@checkpoint.command()
@click.argument("folder")
@TAG_OPTION
@click.option("--values", is_flag=True, help="Read the tensors: norm, extremes, non-finite.")
@click.option("--hash", "hashes", is_flag=True, help="Read the tensors: SHA-256 of each.")
@JSON_OPTION
def inspect(folder: str, tag: str | None, values: bool, hashes: bool, as_json: bool) -> None:
    """Show what a checkpoint holds, tensor by tensor."""
    from drivetrain.checkpoint.opening import opened
    from drivetrain_checkpoint_tools.inspection import inspect as look
    from drivetrain_checkpoint_tools.inspection import overview

    with opened(folder, tag) as stored:
        facts = overview(stored)
        tensors = [asdict(found) for found in look(stored, values=values, hashes=hashes)]
    if as_json:
        click.echo(json.dumps({**facts, "tensors": tensors}, indent=1))
        return
    for key, value in facts.items():
        shown = f"{value:,}" if key == "bytes" else printable(str(value))
        click.echo(f"{key.replace('_', ' ')}: {shown}")
    for row in tensors:
        row |= {"shape": "x".join(map(str, row["shape"])) or "scalar", **row.pop("values")}
        row["nbytes"] = f"{row['nbytes']:,}"
    _table(tensors)


@checkpoint.command()
@click.argument("a")
@click.argument("b")
@JSON_OPTION
def diff(a: str, b: str, as_json: bool) -> None:
    """Compare the tensors of two checkpoints, bit by bit.

    Exit code 1 when they differ.
    """
    from drivetrain.checkpoint.opening import opened
    from drivetrain_checkpoint_tools.comparison import diff as compare

    with opened(a) as one, opened(b) as other:
        found = [asdict(difference) for difference in compare(one, other)]
        same = len(set(one.keys) & set(other.keys)) - sum(
            1 for d in found if d["elements"] is not None
        )
    if as_json:
        click.echo(json.dumps(found, indent=1))
    elif found:
        _table(found)
    else:
        click.echo(f"the same: {same} tensors")
    if found:
        raise SystemExit(1)


@checkpoint.command()
@click.argument("folder")
@click.argument("out")
@TAG_OPTION
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest file.")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The model's config.json, to be copied beside the weights.",
)
def export(
    folder: str, out: str, tag: str | None, dtype: str, max_shard_size: str, config: Path | None
) -> None:
    """Write full weights as safetensors files, which Transformers loads, into the folder OUT."""
    from drivetrain.checkpoint.opening import opened
    from drivetrain_checkpoint_tools.exporting import export as write
    from drivetrain_checkpoint_tools.exporting import parse_size

    with opened(folder, tag) as stored:
        names = write(
            stored,
            out,
            dtype=dtype,
            max_shard_bytes=parse_size(max_shard_size),
            config=config.read_bytes() if config else None,
        )
        click.echo(f"wrote {len(names)} file{'s' * (len(names) > 1)} with {dtype} weights to {out}")


@checkpoint.command("import")
@click.argument("source")
@click.argument("folder")
@click.option("--tag", help="Name of the new checkpoint; default: global_step<N>.")
def import_(source: str, folder: str, tag: str | None) -> None:
    """Make a checkpoint in FOLDER of SOURCE: DeepSpeed's, or weights in safetensors files."""
    from drivetrain_checkpoint_tools.deepspeed import import_deepspeed, looks_like_deepspeed
    from drivetrain_checkpoint_tools.hugging_face import import_weights

    theirs = "://" not in source and looks_like_deepspeed(source)
    place = (import_deepspeed if theirs else import_weights)(source, folder, tag)
    click.echo(f"imported {source} as {place}")


@checkpoint.command("to-megatron")
@click.argument("source")
@click.argument("out")
@click.option("--ranks", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--vocabulary-multiple",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Rows of the vocabulary on each rank are a multiple of this.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The model's config.json; default: that in SOURCE.",
)
def to_megatron(
    source: str, out: str, ranks: int, vocabulary_multiple: int, config: Path | None
) -> None:
    """Write weights of Transformers in SOURCE as a checkpoint of Megatron-DeepSpeed's in OUT."""
    from drivetrain_checkpoint_tools.megatron import to_megatron as write

    place = write(source, out, ranks=ranks, multiple=vocabulary_multiple, config=config)
    click.echo(f"wrote {place} for {ranks} tensor-parallel rank{'s' * (ranks > 1)}")


@checkpoint.command("from-megatron")
@click.argument("source")
@click.argument("out")
@click.option(
    "--config",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The model's config.json, which is copied beside the weights.",
)
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32")
def from_megatron(source: str, out: str, config: Path, dtype: str) -> None:
    """Write weights of a Megatron-DeepSpeed checkpoint as safetensors files in OUT."""
    from drivetrain_checkpoint_tools.exporting import DTYPES
    from drivetrain_checkpoint_tools.megatron import from_megatron as write

    names = write(source, out, config=config, dtype=DTYPES[dtype])
    click.echo(f"wrote {len(names)} file{'s' * (len(names) > 1)} with {dtype} weights to {out}")


def _table(rows: Iterable[dict[str, Any]]) -> None:
    """Print rows under the names of their keys, in lines as long as they have to be."""
    listed = [{k: "" if v is None else printable(str(v)) for k, v in row.items()} for row in rows]
    columns = list(dict.fromkeys(key for row in listed for key in row))
    widths = {c: max(len(c), *(len(row.get(c, "")) for row in listed)) for c in columns}
    for row in [{c: c for c in columns}, *listed]:
        click.echo("  ".join(row.get(c, "").ljust(widths[c]) for c in columns).rstrip())
