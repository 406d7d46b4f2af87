"""DeepSpeed's schedulers and batching helpers as objects of scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from drivetrain.errors import ConfigError
from drivetrain_data_efficiency.routing.draw import kept_tokens
from drivetrain_data_efficiency.sampling.packing import divide, scale_rate
from drivetrain_data_efficiency.sampling.permutation import seed_of
from drivetrain_data_efficiency.sampling.schedule import Difficulty, Schedule
from drivetrain_data_efficiency.section import (
    DataEfficiencySection,
    LtdSchedule,
    MetricSection,
)


class CurriculumScheduler:
    """``runtime.data_pipeline.curriculum_scheduler``: one difficulty, by the schedules here.

    Args:
        config: ``min_difficulty``, ``max_difficulty``, ``schedule_type``, ``schedule_config``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        names = ("min_difficulty", "max_difficulty", "schedule_type", "schedule_config")
        own = {name: config[name] for name in names if name in config}
        metric = MetricSection.model_validate({**own, "clustering_type": "single_cluster"})
        self._difficulty = Difficulty("difficulty", metric)
        self._last = metric.max_difficulty
        self._current = metric.min_difficulty
        self.first_step = True

    def get_current_difficulty(self) -> int:
        """The difficulty in force."""
        return self._current

    def set_current_difficulty(self, difficulty: int) -> None:
        """Put another in force."""
        self._current = difficulty

    def set_custom_get_difficulty(self, schedule_function: Schedule) -> None:
        """Set the function of a schedule of type ``custom``."""
        self._difficulty.schedule = schedule_function

    def get_difficulty(self, global_steps: int) -> int:
        """The difficulty of a step."""
        return self._difficulty.at(global_steps)

    def update_difficulty(self, global_steps: int) -> int:
        """Put the difficulty of a step in force, unless it is the largest already."""
        if self._current < self._last:
            self._current = self.get_difficulty(global_steps)
        return self._current

    def get_state(self) -> dict[str, Any]:
        """What a script may save."""
        return {"current_difficulty": self._current}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`get_state` returned."""
        self._current = int(state["current_difficulty"])

    state_dict = get_state
    load_state_dict = set_state


class BaseScheduler:
    """Kept tokens by step, of a schedule that a subclass puts into ``state``.

    Attributes:
        state: ``min_value``, ``max_value``, ``schedule_type`` and ``schedule_config``, as the
            config's ``random_ltd_schedule`` has them; other keys are the subclass's own.
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def get_value(self, global_steps: int) -> int:
        """Tokens kept at a step.

        Raises:
            ValidationError: of pydantic; ``state`` holds no schedule.
        """
        own = {name: self.state[name] for name in LtdSchedule.model_fields if name in self.state}
        return kept_tokens(global_steps, LtdSchedule.model_validate(own))


class RandomLTDScheduler(BaseScheduler):
    """``runtime.data_pipeline.data_routing.scheduler``: kept tokens and layer tokens by step.

    Args:
        config: the section ``random_ltd``, with ``global_batch_size`` for
            :meth:`get_total_layer_tokens`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._schedule = LtdSchedule.model_validate(config["random_ltd_schedule"])
        self.state = self._schedule.model_dump()
        self._layers, self._total = config["random_ltd_layer_num"], config["total_layer_num"]
        self._batch = config.get("global_batch_size")
        self.reset_to_init()

    def reset_to_init(self) -> None:
        """Begin again."""
        self._current, self._step, self._consumed = self._schedule.min_value, -1, 0

    def get_current_seq(self) -> int:
        """Tokens kept now."""
        return self._current

    def set_current_seq(self, seq_length: int) -> None:
        """Keep another number of tokens."""
        self._current = seq_length

    def get_random_ltd_layer_num(self) -> int:
        """Layers that drop."""
        return int(self._layers)

    def update_seq(self, global_steps: int) -> int:
        """The tokens kept at a step; counts its layer tokens once."""
        if self._current < self._schedule.max_value:
            self._current = kept_tokens(global_steps, self._schedule)
        if global_steps != self._step and self._batch is not None:
            full = self._schedule.max_value * (self._total - self._layers)
            self._consumed += self._batch * (self._current * self._layers + full)
            self._step = global_steps
        return self._current

    def get_total_layer_tokens(self, train_iters: int) -> int:
        """Layer tokens of so many steps from the first.

        Raises:
            ConfigError: the config has no ``global_batch_size``.
        """
        if self._batch is None:
            raise ConfigError("layer tokens need global_batch_size in the config")
        self.reset_to_init()
        for step in range(train_iters):
            self.update_seq(step)
        return self._consumed

    def state_dict(self) -> dict[str, int]:
        """What DeepSpeed saves."""
        return {
            "consumed_layer_tokens": self._consumed,
            "current_steps": self._step,
            "current_value": self._current,
            "min_value": self._schedule.min_value,
            "max_value": self._schedule.max_value,
        }

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._consumed = int(state_dict["consumed_layer_tokens"])
        self._step, self._current = state_dict["current_steps"], state_dict["current_value"]


def get_data_efficiency_config(param_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``data_efficiency`` of a whole config, checked, with every default filled in.

    Raises:
        ValidationError: of pydantic; a key is unknown, or a value is not one that it may have.
    """
    section = DataEfficiencySection.model_validate(param_dict.get("data_efficiency", {}))
    return section.model_dump()


def split_index(start_idx: int, end_idx: int, num_partitions: int) -> list[tuple[int, int]]:
    """Cut the samples from ``start_idx`` to before ``end_idx`` into parts of the same size.

    Parts differ by one sample at most; the first ones have more.
    """
    least, more = divmod(end_idx - start_idx, num_partitions)
    ends = accumulate((least + (part < more) for part in range(num_partitions)), initial=start_idx)
    return list(pairwise(ends))


def split_dataset(
    dataset: Sized, num_workers: int, worker_id: int, num_threads: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The samples of every worker, and those of each thread of one worker."""
    workers = split_index(0, len(dataset), num_workers)
    return workers, split_index(*workers[worker_id], num_threads)


def scale_lr(
    base_batch_size: float, batch_size: float, base_lr: float = 1.0, method: str = "linear"
) -> float:
    """A learning rate meant for ``base_batch_size``, for ``batch_size``."""
    if method not in ("linear", "sqrt") and str(method).lower() != "none":
        raise ValueError(f"unknown scaling method {method!r}: linear, sqrt or none")
    return scale_rate(base_lr, batch_size, base_batch_size, str(method).lower())


def batch_by_seqlens(
    seqlens: Sequence[int],
    max_tokens: int,
    sequence_ids_per_mb: Sequence[Any] | None = None,
    min_batch_size: int = 1,
    max_batch_size: int | None = None,
    sequence_picking_order: str = "dataloader",
    effective_batch_size: int = 1,
    required_microbatches_of_same_size: bool = False,
    verbose: bool = False,
    seed: int | None = None,
) -> tuple[list[tuple[int, list[int]]], list[int], list[int]]:
    """Micro-batches of at most ``max_tokens``, the last samples included.

    Returns:
        (number of the batch, samples) for each micro-batch, samples of each batch, and the longest
        sample of each batch.

    Raises:
        ConfigError: micro-batches of equal size are asked for, or there is not one batch.
    """
    if required_microbatches_of_same_size or sequence_ids_per_mb is not None:
        raise ConfigError(
            "micro-batches of equal numbers of samples (pipelines) and given groups are not "
            "supported: batch by tokens without stages"
        )
    lengths = np.asarray(seqlens)
    order = np.arange(len(lengths))
    if sequence_picking_order == "random":
        order = np.random.default_rng(seed_of("samples", seed or 0)).permutation(len(lengths))
    elif sequence_picking_order == "seqlen":
        order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] <= max_tokens]
    places = divide(lengths[order], max_tokens, smallest=min_batch_size, largest=max_batch_size)
    batches = len(places) // effective_batch_size
    if not batches:
        raise ConfigError(
            f"{len(places)} micro-batches are less than one batch of {effective_batch_size}"
        )
    found = [
        (number // effective_batch_size, order[begin:end].tolist())
        for number, (begin, end) in enumerate(places[: batches * effective_batch_size])
    ]
    sizes, longest = [0] * batches, [0] * batches
    for batch, samples in found:
        sizes[batch] += len(samples)
        longest[batch] = max(longest[batch], int(lengths[samples].max()))
    return found, sizes, longest
