"""Compute metrics over a data set: map over chunks of samples on many processes, then reduce."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from drivetrain.errors import ConfigError, TrainingError
from drivetrain_data_efficiency.analysis.fingerprint import FILE, fingerprint
from drivetrain_data_efficiency.analysis.metrics import Metric
from drivetrain_data_efficiency.analysis.reduction import write_sum, write_values

Array = npt.NDArray[Any]

_CHUNKS = 1024
"""Parts of a data set at most: what is computed again after an interruption is less than one."""


class Analyzer:
    """Writes the files of metrics into ``folder/<metric>``.

    Map computes metrics for chunks of consecutive samples and writes each chunk to a file of its
    own, which is put in its place when it is complete: an analysis that was interrupted goes on
    with the chunks that are missing, also on other processes or ranks. Reduce joins them.

    Args:
        dataset: ``__len__`` and ``__getitem__``.
        metrics: what to compute.
        folder: of all results, seen by all ranks.
        batch_size: samples that a metric is given at once.
        collate_fn: makes a batch of a list of samples; the list itself if ``None``.
        workers: processes on this rank; 0 computes in this one.
        rank: of this process among those that map together.
        world_size: number of them.
        progress: show a bar on standard error.

    Raises:
        ConfigError: the folder has chunks of another data set, or two metrics of one name.
    """

    def __init__(
        self,
        dataset: Any,
        metrics: Sequence[Metric],
        folder: str | os.PathLike[str],
        *,
        batch_size: int = 64,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        progress: bool = True,
    ) -> None:
        if not len(dataset):
            raise ConfigError("there is nothing to analyze: the data set is empty")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"no batch size {batch_size}, or no rank {rank} of {world_size}")
        names = [metric.name for metric in metrics]
        if len(set(names)) != len(names) or not names:
            raise ConfigError(f"metrics need names of their own, got {names}")
        self.dataset, self.metrics = dataset, list(metrics)
        self.folder = Path(folder)
        self._batch, self._collate = batch_size, collate_fn
        self._workers, self._rank, self._ranks = workers, rank, world_size
        self._progress = progress
        per_chunk = -(-len(dataset) // _CHUNKS)
        self._chunk = -(-max(per_chunk, 8 * batch_size) // batch_size) * batch_size
        self._facts = {**fingerprint(dataset), "chunk": self._chunk}

    # -- both ---------------------------------------------------------------------------------

    def run(self, barrier: Callable[[], object] | None = None) -> None:
        """Map and reduce all metrics, those that others have to wait for first.

        Args:
            barrier: waits for all ranks; ``torch.distributed``'s by default, where it is used.
        """
        wait = barrier or _barrier
        for stage in self._stages():
            self.map(stage)
            wait()
            if self._rank == 0:
                self.reduce(stage)
            wait()

    def _stages(self) -> list[list[Metric]]:
        first = [metric.after for metric in self.metrics if metric.after is not None]
        own = [metric for metric in self.metrics if metric.after is None]
        known = {metric.name for metric in own}
        unique = {metric.name: metric for metric in first if metric.name not in known}
        later = [metric for metric in self.metrics if metric.after is not None]
        stages = [[*own, *unique.values()], later]
        return [stage for stage in stages if stage]

    # -- map ----------------------------------------------------------------------------------

    def map(self, metrics: Sequence[Metric] | None = None) -> None:
        """Compute what is missing of this rank's chunks, of all metrics or some.

        Raises:
            TrainingError: a metric returned something of another shape; names the samples.
        """
        wanted = list(self.metrics if metrics is None else metrics)
        for metric in wanted:
            self._check_folder(metric)
        measures = [(metric, self._measure(metric)) for metric in wanted]
        starts = range(0, len(self.dataset), self._chunk)
        own = list(starts)[self._rank :: self._ranks]
        missing = [s for s in own if any(not self._part(m, s).exists() for m in wanted)]
        task = _Task(self, measures)
        with _bar(self._progress and self._rank == 0, len(own), len(own) - len(missing)) as advance:
            for _ in _spread(task, missing, self._workers):
                advance(1)

    def _check_folder(self, metric: Metric) -> None:
        folder = self.folder / metric.name / "map"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "of.json"
        if file.exists():
            found = json.loads(file.read_text("utf-8"))
            if found != self._facts:
                raise ConfigError(
                    f"{folder} has parts of an analysis of another data set or batch size "
                    f"({found['samples']} samples in chunks of {found['chunk']}, here "
                    f"{self._facts['samples']} in chunks of {self._chunk}): remove the folder"
                )
            return
        part = folder / f"of.{os.getpid()}.part"
        part.write_text(json.dumps(self._facts), "utf-8")
        part.replace(file)

    def _measure(self, metric: Metric) -> Callable[[Any], Any]:
        if metric.after is None:
            assert metric.measure is not None, metric.name
            return metric.measure
        assert metric.given is not None, metric.name
        from drivetrain_data_efficiency.analysis.indexed import IndexedDataset

        name = metric.after.name
        prefix = self.folder / name / f"{name}_metric_value"
        return metric.given(np.array(IndexedDataset(prefix)[0]))

    def _part(self, metric: Metric, start: int) -> Path:
        return self.folder / metric.name / "map" / f"{start:012d}.npy"

    def map_chunk(self, start: int, measures: Sequence[tuple[Metric, Any]]) -> None:
        """Compute and write the chunk that begins with sample ``start``."""
        measures = [(m, f) for m, f in measures if not self._part(m, start).exists()]
        stop = min(start + self._chunk, len(self.dataset))
        found: list[list[Array]] = [[] for _ in measures]
        for begin in range(start, stop, self._batch):
            end = min(begin + self._batch, stop)
            samples = self._samples(begin, end)
            batch = samples if self._collate is None else self._collate(samples)
            for results, (metric, measure) in zip(found, measures, strict=True):
                results.append(_result(metric, measure, batch, begin, end))
        for results, (metric, _) in zip(found, measures, strict=True):
            whole = np.sum(results, axis=0) if metric.kind == "sum" else np.concatenate(results)
            part = self._part(metric, start).with_suffix(f".{os.getpid()}.part")
            with part.open("wb") as file:
                np.save(file, whole)
            part.replace(self._part(metric, start))

    def _samples(self, begin: int, end: int) -> list[Any]:
        several = getattr(self.dataset, "__getitems__", None)
        if several is not None:
            return list(several(list(range(begin, end))))
        return [self.dataset[number] for number in range(begin, end)]

    # -- reduce -------------------------------------------------------------------------------

    def reduce(self, metrics: Sequence[Metric] | None = None) -> None:
        """Join all chunks of all metrics, or some, into their files.

        Raises:
            TrainingError: chunks are missing; says how many and which is the first.
        """
        starts = range(0, len(self.dataset), self._chunk)
        for metric in self.metrics if metrics is None else metrics:
            missing = [s for s in starts if not self._part(metric, s).exists()]
            if missing:
                raise TrainingError(
                    f"the metric {metric.name} lacks {len(missing)} of {len(starts)} chunks, the "
                    f"first at sample {missing[0]}: run map again on all workers"
                )
            parts = (np.load(self._part(metric, start)) for start in starts)
            folder = self.folder / metric.name
            if metric.kind == "sum":
                write_sum(folder, metric.name, sum(parts))
                continue
            whole = np.concatenate(list(parts))
            if metric.reduce is not None:
                whole = np.asarray(metric.reduce(whole))
            write_values(folder, metric.name, whole)
            facts = {key: self._facts[key] for key in ("samples", "digest")}
            (folder / FILE).write_text(json.dumps(facts), "utf-8")


class _Task:
    """What processes that are forked find in memory, so that nothing has to be pickled."""

    current: _Task | None = None

    def __init__(self, analyzer: Analyzer, measures: Sequence[tuple[Metric, Any]]) -> None:
        self.analyzer, self.measures = analyzer, measures

    def __call__(self, start: int) -> int:
        self.analyzer.map_chunk(start, self.measures)
        return start


def _call(start: int) -> int:
    assert _Task.current is not None
    return _Task.current(start)


def _begin(task: _Task | None) -> None:
    """Prepare a process: processes share the cores, so each computes with one thread."""
    if task is not None:
        _Task.current = task
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _spread(task: _Task, starts: Sequence[int], workers: int) -> Iterator[int]:
    if workers < 1 or len(starts) < 2:
        for start in starts:
            yield task(start)
        return
    forks = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if forks else "spawn")
    _Task.current = task if forks else None
    try:
        with context.Pool(min(workers, len(starts)), _begin, (None if forks else task,)) as pool:
            yield from pool.imap_unordered(_call, starts)
    finally:
        _Task.current = None


def _result(metric: Metric, measure: Any, batch: Any, begin: int, end: int) -> Array:
    where = f"the metric {metric.name} of samples {begin} to {end - 1}"
    try:
        found = measure(batch)
    except Exception as error:
        error.add_note(f"while computing {where}")
        raise
    array = np.asarray(found.detach().cpu() if hasattr(found, "detach") else found)
    if metric.strict and array.dtype != np.dtype(metric.dtype):
        raise TrainingError(f"{where} is {array.dtype}, and {np.dtype(metric.dtype)} was said")
    if metric.kind == "sum":
        return array
    if len(array) != end - begin or (metric.kind == "value" and array.ndim > 1):
        array = array.reshape(-1) if array.size == end - begin else array
        if len(array) != end - begin:
            raise TrainingError(f"{where} has shape {array.shape}: one number each was expected")
    if metric.kind == "value" and array.dtype.kind not in "iu":
        raise TrainingError(
            f"{where} is {array.dtype}; metrics are whole numbers, so scale and round it"
        )
    return array


@contextmanager
def _bar(shown: bool, total: int, done: int) -> Iterator[Callable[[int], object]]:
    """A bar of chunks, where standard error is a terminal; yields what adds to it."""
    if not shown:
        yield lambda count: None
        return
    import click

    with click.progressbar(length=total, file=sys.stderr, label="chunks", show_pos=True) as bar:
        bar.update(done)
        yield bar.update


def _barrier() -> None:
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
