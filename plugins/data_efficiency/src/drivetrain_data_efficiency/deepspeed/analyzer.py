"""``deepspeed.runtime.data_pipeline.data_sampling.data_analyzer``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from drivetrain.errors import ConfigError
from drivetrain_data_efficiency.analysis.analyzer import Analyzer
from drivetrain_data_efficiency.analysis.metrics import Metric

_KINDS: dict[str, Any] = {
    "single_value_per_sample": "value",
    "accumulate_value_over_samples": "sum",
}


class DataAnalyzer:
    """DeepSpeed's analyzer by this package's: the same files, without one CSV for each value.

    Sample ids are running numbers. A field ``index`` of batches and ``sample_indices`` are refused,
    since positions in the data set are what the sampler needs.

    Args:
        dataset: ``__len__`` and ``__getitem__``.
        num_workers: processes, on any machines, that map together.
        worker_id: of this one.
        num_threads: processes that this worker maps with.
        num_threads_reduce: no effect, as reduction is not what takes time.
        specific_threads: not supported.
        batch_size: samples at once.
        metric_names: names.
        metric_functions: each takes a batch.
        metric_types: ``single_value_per_sample`` or ``accumulate_value_over_samples``.
        metric_dtypes: dtypes that functions return, which are checked.
        save_path: folder of all results.
        collate_fn: makes a batch; torch's default.
        sample_indices: not supported.

    Raises:
        ConfigError: the lists are not of one length, or something is not supported.
    """

    def __init__(
        self,
        dataset: Any,
        num_workers: int = 1,
        worker_id: int = 0,
        num_threads: int = 1,
        num_threads_reduce: int = 1,
        specific_threads: Sequence[int] = (),
        batch_size: int = 1,
        metric_names: Sequence[str] = (),
        metric_functions: Sequence[Callable[[Any], Any]] = (),
        metric_types: Sequence[str] = (),
        metric_dtypes: Sequence[Any] = (),
        save_path: str = "./",
        collate_fn: Callable[[list[Any]], Any] | None = None,
        custom_map_init: Any | None = None,
        custom_map_update: Any | None = None,
        custom_map_finalize: Any | None = None,
        custom_reduce: Any | None = None,
        sample_indices: Any | None = None,
    ) -> None:
        given = {
            "specific_threads": specific_threads,
            "custom_map_init": custom_map_init,
            "custom_map_update": custom_map_update,
            "custom_map_finalize": custom_map_finalize,
            "custom_reduce": custom_reduce,
            "sample_indices": sample_indices,
        }
        if wrong := [name for name, value in given.items() if value not in (None, (), [])]:
            raise ConfigError(
                f"{wrong[0]} is not supported; use drivetrain_data_efficiency.Analyzer"
            )
        metrics = _metrics(metric_names, metric_functions, metric_types, metric_dtypes)
        self._analyzer = Analyzer(
            dataset,
            metrics,
            save_path,
            batch_size=batch_size,
            collate_fn=collate_fn or _default_collate(),
            workers=num_threads if num_threads > 1 else 0,
            rank=worker_id,
            world_size=num_workers,
            progress=False,
        )

    def run_map(self) -> None:
        """Map this worker's part."""
        self._analyzer.map()

    def run_reduce(self) -> None:
        """Join what all workers have mapped."""
        self._analyzer.reduce()

    def run_map_reduce(self, comm_group: Any | None = None) -> None:
        """Map on all workers, wait, reduce on the first, wait."""
        self._analyzer.run(None if comm_group is None else _barrier(comm_group))


class DistributedDataAnalyzer:
    """The same over the ranks of a job; rank 0 reduces."""

    def __init__(
        self,
        dataset: Any,
        num_workers: int = 1,
        num_threads: int = 1,
        worker_id: int = 0,
        batch_size: int = 1,
        metric_names: Sequence[str] = (),
        metric_functions: Sequence[Callable[[Any], Any]] = (),
        metric_types: Sequence[str] = (),
        save_path: str = "./",
        collate_fn: Callable[[list[Any]], Any] | None = None,
        device: str = "cuda",
        comm_group: Any | None = None,
        sample_indices: Any | None = None,
    ) -> None:
        import torch.distributed as dist

        rank, size = worker_id, num_workers
        if dist.is_initialized():
            rank, size = dist.get_rank(comm_group), dist.get_world_size(comm_group)
        self._group = comm_group
        self._analyzer = DataAnalyzer(
            dataset,
            num_workers=size,
            worker_id=rank,
            num_threads=num_threads,
            batch_size=batch_size,
            metric_names=metric_names,
            metric_functions=metric_functions,
            metric_types=metric_types,
            save_path=save_path,
            collate_fn=collate_fn,
            sample_indices=sample_indices,
        )

    def run_map_reduce(self) -> None:
        """Map on all ranks, wait, reduce on the first, wait."""
        self._analyzer.run_map_reduce(self._group)


def _metrics(
    names: Sequence[str], functions: Sequence[Any], types: Sequence[str], dtypes: Sequence[Any]
) -> list[Metric]:
    if not len(names) == len(functions) == len(types):
        raise ConfigError(
            f"{len(names)} metric_names, {len(functions)} metric_functions and {len(types)} "
            "metric_types: there must be one of each for a metric"
        )
    if unknown := [kind for kind in types if kind not in _KINDS]:
        raise ConfigError(f"metric type {unknown[0]!r} is none of {', '.join(_KINDS)}")
    found = []
    for number, (name, function, kind) in enumerate(zip(names, functions, types, strict=True)):
        given = dtypes[number] if number < len(dtypes) else None
        dtype = np.int64 if given is None else _dtype(given)
        found.append(Metric(name, function, _KINDS[kind], dtype, strict=given is not None))
    return found


def _dtype(given: Any) -> Any:
    """A dtype of NumPy for one of torch or NumPy."""
    return np.dtype(str(given).removeprefix("torch.") if "torch" in str(given) else given)


def _default_collate() -> Callable[[list[Any]], Any]:
    from torch.utils.data import default_collate

    return default_collate


def _barrier(group: Any) -> Callable[[], object]:
    def wait() -> None:
        import torch.distributed as dist

        dist.barrier(group)

    return wait
