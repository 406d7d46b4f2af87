"""Which samples a curriculum has opened: clusters of those that came in together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from drivetrain.errors import ConfigError
from drivetrain_data_efficiency.analysis.indexed import IndexedDataset
from drivetrain_data_efficiency.sampling.permutation import Permutation
from drivetrain_data_efficiency.section import MetricSection

_CHUNK = 1 << 22


class Ranking:
    """The samples in the order of one metric; a difficulty opens so many from the first.

    Files are mapped, so neither time nor memory grow with the number of samples.

    Args:
        name: of the metric.
        metric: its section, of clustering type ``schedule_based``.
        samples: of the data set.

    Raises:
        ConfigError: files are missing, of another data set, or open nothing at first.
    """

    def __init__(self, name: str, metric: MetricSection, samples: int) -> None:
        self._metric = metric
        assert metric.index_to_sample_path is not None
        self._rows = IndexedDataset(metric.index_to_sample_path)
        self.order = self._rows.flat
        """Sample numbers, by rising value."""
        if len(self.order) != samples:
            raise ConfigError(
                f"{metric.index_to_sample_path} lists {len(self.order)} samples, but the data set "
                f"has {samples}: run the analyzer over this data set"
            )
        self._values: Any = None
        if metric.difficulty_type == "value":
            assert metric.index_to_metric_path is not None
            self._values = IndexedDataset(metric.index_to_metric_path).flat
            if len(self._values) != len(self._rows):
                raise ConfigError(
                    f"{metric.index_to_metric_path} has {len(self._values)} values for "
                    f"{len(self._rows)} rows of {metric.index_to_sample_path}; with difficulty_type"
                    " value the latter must be the one that is not merged"
                )
        if not self.opened(metric.min_difficulty):
            least = f"; the smallest value is {self._values[0]}" if self._values is not None else ""
            raise ConfigError(
                f"no sample is as easy as min_difficulty {metric.min_difficulty} of the metric "
                f"{name}{least}: raise min_difficulty"
            )

    def facts(self) -> tuple[Any, ...]:
        """Tell this ranking from others, without reading all of it: a sketch of its order."""
        places = np.linspace(0, len(self.order) - 1, 1024).astype(np.int64)
        sketch = np.asarray(self.order[places], np.int64)
        return len(self.order), hashlib.sha256(sketch.tobytes()).hexdigest()

    def opened(self, difficulty: int) -> int:
        """How many samples of :attr:`order` a difficulty opens.

        By value those up to it; by percentile ``samples // max_difficulty`` for each percentile,
        and all at the last.
        """
        total: int = len(self.order)
        if self._values is None:
            last = self._metric.max_difficulty
            return total if difficulty == last else int(difficulty * (total // last))
        row = int(np.searchsorted(self._values, difficulty, side="right"))
        if row == len(self._rows):
            return total
        return int(self._rows.offsets[row] // self._rows.dtype.itemsize)


class Cluster:
    """Samples that came in together, dealt out in a random order, and again in another.

    Args:
        samples: their numbers.
        place: names the cluster's order among all others.
    """

    def __init__(self, samples: npt.NDArray[Any], *place: str | int) -> None:
        self._samples = samples
        self._place = place
        self._passes: dict[int, Permutation] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def take(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """The ``count`` samples after the first ``start`` that it has dealt out, int64."""
        found = []
        while count:
            number, begin = divmod(start, len(self))
            end = min(begin + count, len(self))
            if number not in self._passes:
                self._passes = {number: Permutation(len(self), *self._place, number)}
            places = self._passes[number].part(begin, end)
            found.append(np.asarray(self._samples[places], np.int64))
            start, count = start + end - begin, count - (end - begin)
        return np.concatenate(found) if found else np.empty(0, np.int64)


class Clusters:
    """The clusters of a curriculum, in the order in which they came in.

    With one metric a cluster is a stretch of that metric's ranking. With several it is the samples
    that all of them have opened, less those of clusters before; their numbers are written to files
    that are named by their contents, so that ranks that write them at once write the same.

    Args:
        metrics: those that open samples.
        samples: of the data set.
        folder: for lists of samples.
        seed: of all orders.
    """

    def __init__(
        self, metrics: Mapping[str, MetricSection], samples: int, folder: str | None, seed: int
    ) -> None:
        self._rankings = {name: Ranking(name, m, samples) for name, m in metrics.items()}
        self._total, self._seed = samples, seed
        self._folder = None if folder is None else Path(folder)
        self.history: list[list[int]] = []
        """For each cluster what every metric had opened with it, by the order of metrics."""
        self.clusters: list[Cluster] = []
        self._reached: list[int] = [0] * len(self._rankings)

    def open(self, difficulties: Mapping[str, int]) -> None:
        """Add what difficulties open. They only ever open more; one that falls closes nothing."""
        if not self._rankings:
            if not self.clusters:
                self._add(np.arange(self._total), [])
            return
        reached = [
            max(before, ranking.opened(difficulties[name]))
            for before, (name, ranking) in zip(self._reached, self._rankings.items(), strict=True)
        ]
        if reached != self._reached:
            self._extend(reached)

    def restore(self, history: Sequence[Sequence[int]]) -> None:
        """Have the clusters that a run had, where these are not the ones already there."""
        wanted = [list(reached) for reached in history]
        if wanted == self.history:
            return
        self.history, self.clusters, self._reached = [], [], [0] * len(self._rankings)
        for reached in wanted:
            if len(reached) != len(self._rankings) or max(reached, default=0) > self._total:
                raise ConfigError("the checkpoint is of a curriculum with other metrics")
            if not self._rankings:
                self._add(np.arange(self._total), [])
            else:
                self._extend(reached)

    def sizes(self) -> npt.NDArray[np.int64]:
        """Samples of every cluster, int64."""
        return np.array([len(cluster) for cluster in self.clusters], np.int64)

    def _extend(self, reached: list[int]) -> None:
        before, self._reached = self._reached, reached
        rankings = list(self._rankings.values())
        if len(rankings) == 1:
            samples: Any = rankings[0].order[before[0] : reached[0]]
        else:
            samples = self._several(before, reached)
        if len(samples):
            self._add(samples, reached)

    def _add(self, samples: npt.NDArray[Any], reached: list[int]) -> None:
        self.clusters.append(Cluster(samples, "cluster", self._seed, len(self.clusters)))
        self.history.append(reached)

    def _several(self, before: list[int], reached: list[int]) -> npt.NDArray[Any]:
        """Samples that are in all stretches ``reached`` and not in all of ``before``."""
        assert self._folder is not None
        facts = [ranking.facts() for ranking in self._rankings.values()]
        named = hashlib.sha256(repr((facts, self._total, before, reached)).encode()).hexdigest()
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"cluster_{named[:24]}.npy"
        with _lock(self._folder / f".{named[:24]}.lock"):
            if not file.exists():
                part = self._folder / f".{named[:24]}.{os.getpid()}.part"
                with part.open("wb") as target:
                    np.save(target, self._common(before, reached))
                part.replace(file)
        found: npt.NDArray[Any] = np.load(file, mmap_mode="r")
        return found

    def _common(self, before: list[int], reached: list[int]) -> npt.NDArray[np.int64]:
        """Count for every sample the metrics that have opened it, a byte each."""
        counts = np.zeros(self._total, np.uint8)
        rankings = list(self._rankings.values())
        for ranking, stop in zip(rankings, before, strict=True):
            for start in range(0, stop, _CHUNK):
                counts[ranking.order[start : min(start + _CHUNK, stop)]] += 1
        complete, found = len(rankings), []
        for ranking, begin, stop in zip(rankings, before, reached, strict=True):
            for start in range(begin, stop, _CHUNK):
                samples = np.asarray(ranking.order[start : min(start + _CHUNK, stop)], np.int64)
                counts[samples] += 1
                found.append(samples[counts[samples] == complete])
        return np.concatenate(found)


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Let one process of the host at a time in; the system lets go when a process ends."""
    try:
        import fcntl
    except ImportError:  # then several do the same work
        yield
        return
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    # The file stays: if it was removed, a third process could lock another one of its name.
