"""Micro-batches by their number of tokens: core's ``SampleOrder``, an item for each."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from drivetrain.contracts import LoaderRequest
from drivetrain.engine.loader import DataLoader
from drivetrain.errors import CheckpointError, ConfigError
from drivetrain_data_efficiency.analysis.fingerprint import check_folder
from drivetrain_data_efficiency.analysis.indexed import IndexedDataset
from drivetrain_data_efficiency.sampling.packing import (
    divide,
    pack_samples,
    pad_samples,
    scale_rate,
)
from drivetrain_data_efficiency.sampling.permutation import Permutation, seed_of
from drivetrain_data_efficiency.section import DataEfficiencySection, DynamicBatchingSection

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job

logger = logging.getLogger("drivetrain.data_efficiency")

PATH = "data_efficiency.data_sampling.dynamic_batching"

Array = npt.NDArray[Any]


class TokenBatches:
    """Deals out micro-batches of at most ``max_tokens``, the same ones in every epoch.

    Samples are put in order (as they are, shuffled, by rising length), and divided as they come.
    In ``random`` order micro-batches are shuffled again every epoch. What is left of the last step
    of an epoch is left out, so that every step has as many micro-batches. All of it depends on the
    seed and the global batch, and not on ranks.

    Args:
        lengths: [samples], tokens of each.
        section: sizes and order.
        per_step: micro-batches of a step over all ranks.
        seed: of shuffles.

    Raises:
        ConfigError: there is not one whole step.
    """

    def __init__(
        self, lengths: Array, section: DynamicBatchingSection, *, per_step: int, seed: int
    ) -> None:
        assert section.max_tokens is not None
        self._section, self._per_step, self._seed = section, per_step, seed
        lengths = np.asarray(lengths)
        order = np.arange(len(lengths))
        if section.sequence_picking_order == "random":
            order = np.random.default_rng(seed_of("samples", seed)).permutation(len(lengths))
        elif section.sequence_picking_order == "seqlen":
            order = np.argsort(lengths, kind="stable")
        fits = lengths[order] <= section.max_tokens
        if not fits.all():
            logger.warning(
                "%s: %d of %d samples have more than max_tokens = %d tokens and are left out",
                PATH,
                int((~fits).sum()),
                len(lengths),
                section.max_tokens,
            )
        self._order = order[fits]
        self._tokens = np.concatenate([[0], np.cumsum(lengths[self._order], dtype=np.int64)])
        self._places = divide(
            lengths[self._order],
            section.max_tokens,
            smallest=section.min_batch_size,
            largest=section.max_batch_size,
            padded=section.pad,
        )
        self._steps = len(self._places) // per_step
        if not self._steps:
            raise ConfigError(
                f"{PATH}: the data set makes {len(self._places)} micro-batches, and a step has "
                f"{per_step} (train_batch_size); lower max_tokens or train_batch_size"
            )
        self.latest = 0, 0
        """Epoch and position of the round that was handed out last."""

    def __len__(self) -> int:
        return self._steps * self._per_step

    def items(self, epoch: int, start: int) -> Iterator[Sequence[int]]:
        """Micro-batches of an epoch from a position on, as numbers of samples."""
        for number in self._numbers(epoch, start, len(self)):
            first, last = self._places[number]
            yield self._order[first:last].tolist()

    def _numbers(self, epoch: int, start: int, stop: int) -> Array:
        if self._section.sequence_picking_order != "random":
            return np.arange(start, stop)
        shuffled = Permutation(len(self._places), "micro-batches", self._seed, epoch)
        return shuffled.part(start, stop)

    def step_counts(self, epoch: int, start: int) -> tuple[int, int]:
        """Samples and tokens of the step, over all ranks, that a position belongs to."""
        first = start - start % self._per_step
        numbers = self._numbers(epoch, first, first + self._per_step)
        begins, ends = self._places[numbers].T
        return int((ends - begins).sum()), int((self._tokens[ends] - self._tokens[begins]).sum())

    def step_samples(self, epoch: int, start: int) -> int:
        """Samples of the step, over all ranks, that a position belongs to."""
        return self.step_counts(epoch, start)[0]

    @property
    def mean_samples(self) -> float:
        """Samples of a step, on average."""
        counts = self._places[:, 1] - self._places[:, 0]
        return float(counts.mean() * self._per_step)

    def state_dict(self, epoch: int, start: int) -> dict[str, Any]:
        """What has to agree for a position to mean the same."""
        return {"batches": len(self._places), "seed": self._seed}

    def load_state_dict(self, state: Any) -> None:
        """Check that micro-batches are those that were saved.

        Raises:
            CheckpointError: they are not.
        """
        now = self.state_dict(0, 0)
        if state != now:
            raise CheckpointError(
                f"{PATH}: the checkpoint's loader had {state}, and this one has {now}, so other "
                "samples would come: use its data set, its seed and its max_tokens"
            )

    def finish(self, batch: Any, epoch: int, start: int) -> Any:
        """Remember where the step under way is."""
        self.latest = epoch, start
        if self._section.verbose and start % self._per_step == 0:
            logger.info(
                "%s: epoch %d, step %d of %d has %d samples in %d micro-batches",
                *(PATH, epoch, start // self._per_step + 1, self._steps),
                *(self.step_samples(epoch, start), self._per_step),
            )
        return batch


_of_job: WeakKeyDictionary[Any, TokenBatches] = WeakKeyDictionary()
"""The order of a job's latest training loader."""


def token_loader(job: Job, request: LoaderRequest, section: DataEfficiencySection) -> DataLoader:
    """A loader of micro-batches by tokens."""
    own, batch = section.batching, job.plan.batch
    assert own is not None
    assert batch is not None
    if request.batch_size != 1:
        raise ConfigError(
            f"{PATH}: a micro-batch is made by tokens and counts as one sample, but micro-batches "
            f"have {request.batch_size}: set train_micro_batch_size_per_gpu to 1, and "
            "train_batch_size to the micro-batches of a step"
        )
    if own.pack and request.collate_fn is not None:
        raise ConfigError(f"{PATH}.pack makes micro-batches, so collate_fn has no place")
    lengths = sample_lengths(request.dataset, own.metrics_path)
    order = TokenBatches(lengths, own, per_step=batch.train_batch_size, seed=section.seed)
    collate = request.collate_fn or (pack_samples if own.pack else pad_samples)
    _of_job[job] = order
    return DataLoader(replace(request, order=order, finish=order.finish, collate_fn=collate))


def sample_lengths(dataset: Any, metrics_path: str | None) -> Array:
    """Tokens of each sample: from the analyzer's files, or as the data set says.

    Raises:
        ConfigError: neither says them, or the files are of another data set.
    """
    if metrics_path is not None:
        folder = Path(metrics_path) / "seqlen"
        check_folder(folder, "seqlen", dataset)
        lengths: Any = IndexedDataset(folder / "seqlen_sample_to_metric").flat
        where = str(folder)
    else:
        lengths = getattr(dataset, "lengths", getattr(dataset, "sizes", None))
        where = f"{type(dataset).__name__}.lengths"
        if lengths is None:
            raise ConfigError(
                f"{PATH} needs the samples' lengths: run `drivetrain data analyze` and set "
                f"metrics_path to its folder, or give {type(dataset).__name__} an attribute lengths"
            )
    if len(lengths) != len(dataset):
        raise ConfigError(f"{where} has {len(lengths)} lengths of {len(dataset)} samples")
    return np.asarray(lengths)


def rate_factor(engine: Engine, section: DynamicBatchingSection) -> float:
    """The factor on the rate of the step under way, by its samples; 1 with other batches."""
    order = _of_job.get(engine.job)
    if order is None or section.lr_scaling_method == "none":
        return 1.0
    base = section.base_batch_size or order.mean_samples
    return scale_rate(1.0, order.step_samples(*order.latest), base, section.lr_scaling_method)


def step_under_way(engine: Engine) -> tuple[int, int] | None:
    """Samples and tokens of the step under way; ``None`` if the engine has no such loader."""
    order = _of_job.get(engine.job)
    return None if order is None else order.step_counts(*order.latest)
