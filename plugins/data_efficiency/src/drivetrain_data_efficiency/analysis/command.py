"""``drivetrain data``: analyze, look at metrics, join analyses and data sets, index shards."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path
from typing import Any

import click

from drivetrain.cli import UserPath
from drivetrain.errors import ConfigError

_PATH = UserPath(path_type=Path)


@click.group()
def data() -> None:
    """Compute and look at metrics of data sets, for curricula and batches by tokens."""


@data.command()
@click.argument("source")
@click.argument("folder", type=_PATH)
@click.option(
    "-m",
    "--metric",
    "metrics",
    multiple=True,
    default=("seqlen",),
    show_default=True,
    help="seqlen, vocabulary, vocabularyrarity, duplicates, or FILE.py:NAME or MODULE:NAME of a "
    "Metric, a function of a list of samples, or a function without arguments that returns one.",
)
@click.option("-w", "--workers", default=0, help="Processes; 0 computes in this one.")
@click.option("-b", "--batch-size", default=64, show_default=True, help="Samples at once.")
@click.option("--vocabulary-size", type=int, help="For vocabulary and vocabularyrarity.")
@click.option("--rank", default=0, help="Part of several that map; then --reduce.")
@click.option("--world-size", default=1, help="Number of these parts.")
@click.option("--reduce", "only_reduce", is_flag=True, help="Only join what all parts have mapped.")
def analyze(
    source: str,
    folder: Path,
    metrics: tuple[str, ...],
    workers: int,
    batch_size: int,
    vocabulary_size: int | None,
    rank: int,
    world_size: int,
    only_reduce: bool,
) -> None:
    """Compute metrics of SOURCE into FOLDER; goes on where an earlier run stopped.

    SOURCE is the prefix of an indexed data set of tokens, or FILE.py:NAME or MODULE:NAME of a data
    set, or of a function without arguments that returns one.
    """
    from drivetrain_data_efficiency.analysis.analyzer import Analyzer
    from drivetrain_data_efficiency.analysis.summary import summary

    chosen = [_metric(name, vocabulary_size) for name in metrics]
    analyzer = Analyzer(
        _dataset(source),
        chosen,
        folder,
        batch_size=batch_size,
        workers=workers,
        rank=rank,
        world_size=world_size,
    )
    if only_reduce:
        analyzer.reduce()
    elif world_size > 1:
        if waiting := [metric.name for metric in chosen if metric.after is not None]:
            raise ConfigError(
                f"{waiting[0]} needs another metric of the whole data set first: analyze "
                "vocabulary on all parts and --reduce it, or start all ranks with drivetrain run"
            )
        analyzer.map()
        click.echo(f"part {rank} of {world_size} is mapped; when all are: --reduce")
        return
    else:
        analyzer.run()
    for metric in chosen:
        if metric.kind != "sum":
            click.echo("\n".join(summary(folder / metric.name).lines()))


@data.command()
@click.argument("folder", type=_PATH)
@click.option("--picture", type=_PATH, help="Write a histogram (SVG); of several metrics a folder.")
def inspect(folder: Path, picture: Path | None) -> None:
    """Show the metrics in FOLDER, that of an analysis or of one metric."""
    from drivetrain_data_efficiency.analysis.summary import metric_folders, summary

    folders = metric_folders(folder)
    for found in folders:
        facts = summary(found)
        click.echo("\n".join(facts.lines()))
        if picture is not None:
            file = picture if len(folders) == 1 else picture / f"{facts.name}.svg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(facts.picture(), "utf-8")
            click.echo(f"  picture: {file}")


@data.command()
@click.argument("target", type=_PATH)
@click.argument("sources", type=_PATH, nargs=-1, required=True)
def merge(target: Path, sources: tuple[Path, ...]) -> None:
    """Join SOURCES, analyses or indexed data sets (prefixes) in this order, into TARGET."""
    from drivetrain_data_efficiency.analysis import indexed
    from drivetrain_data_efficiency.analysis.summary import merge_metrics

    if not all(indexed.exists(source) for source in sources):
        names = merge_metrics(target, sources)
        click.echo(f"{', '.join(names)} of {len(sources)} analyses in {target}")
        return
    if indexed.exists(target):
        raise ConfigError(f"{target} is an indexed data set already; merge into a new one")
    writer = indexed.IndexedWriter(
        indexed.data_file(target), indexed.IndexedDataset(sources[0]).dtype
    )
    for source in sources:
        writer.merge_file_(source)
    writer.finalize(indexed.index_file(target))
    click.echo(f"{len(indexed.IndexedDataset(target)):,} items in {target}")


@data.command()
@click.argument("prefix", type=_PATH)
@click.argument("shards", nargs=-1, required=True)
@click.option("-w", "--workers", default=0, help="Processes; 0 reads in this one.")
def index(prefix: Path, shards: tuple[str, ...], workers: int) -> None:
    """Index SHARDS, tar files in WebDataset's layout or Parquet files, for TarShards and
    ParquetShards.

    Of tar files headers are read, of Parquet files footers. The index is PREFIX.json, PREFIX.bin
    and PREFIX.idx; names of shards beside or below it are kept relative to it.
    """
    from drivetrain_data_efficiency.streaming.index import index_shards

    found = index_shards(prefix, shards, workers)
    rows = found.rows
    tar = found.kind == "tar"
    samples = int(rows.sizes.sum()) - len(rows) if tar else int(rows.flat.sum())
    size = sum(size for _, size in found.files)
    click.echo(
        f"{len(found.files):,} {found.kind} shards, {samples:,} samples, {size / 2**30:,.2f} GiB: "
        f"{prefix}.json"
    )


def _named(text: str) -> Any:
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise ConfigError(f"{text!r} is neither FILE.py:NAME nor MODULE:NAME")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise ConfigError(f"there is no file {place}")
        names = runpy.run_path(place)
    else:
        try:
            names = vars(importlib.import_module(place))
        except ModuleNotFoundError as error:
            raise ConfigError(f"the module of {text!r} cannot be imported: {error}") from error
    if name not in names:
        raise ConfigError(f"{place} has no {name!r}")
    return names[name]


def _dataset(source: str) -> Any:
    from drivetrain_data_efficiency.analysis import indexed

    if indexed.exists(source):
        return indexed.IndexedDataset(source)
    if ":" not in source:
        raise ConfigError(
            f"{source} is neither an indexed data set nor FILE.py:NAME or MODULE:NAME"
        )
    found = _named(source)
    makes = isinstance(found, type) or not hasattr(found, "__getitem__")
    found = found() if makes and callable(found) else found
    if not hasattr(found, "__len__") or not hasattr(found, "__getitem__"):
        raise ConfigError(f"{source} is a {type(found).__name__}: no __len__ and __getitem__")
    return found


def _metric(name: str, vocabulary_size: int | None) -> Any:
    from drivetrain_data_efficiency.analysis import metrics

    if name == "seqlen":
        return metrics.length()
    if name == "duplicates":
        return metrics.near_duplicates()
    if name in ("vocabulary", "vocabularyrarity"):
        if vocabulary_size is None:
            raise ConfigError(f"the metric {name} needs --vocabulary-size")
        maker = metrics.vocabulary if name == "vocabulary" else metrics.vocabulary_rarity
        return maker(vocabulary_size)
    if ":" not in name:
        raise ConfigError(
            f"no metric is called {name!r}; there are seqlen, vocabulary, vocabularyrarity and "
            "duplicates, or FILE.py:NAME"
        )
    found = _named(name)
    if isinstance(found, metrics.Metric):
        return found
    if not callable(found):
        raise ConfigError(f"{name} is a {type(found).__name__}, neither a Metric nor a function")
    if found.__code__.co_argcount == 0 if hasattr(found, "__code__") else False:
        made = found()
        if isinstance(made, metrics.Metric):
            return made
    return metrics.Metric(name.rpartition(":")[2], found)
