"""``deepspeed.runtime.data_pipeline.data_sampling.data_sampler``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from drivetrain.errors import CheckpointError, ConfigError
from drivetrain_data_efficiency.sampling.curriculum import CurriculumOrder
from drivetrain_data_efficiency.sampling.schedule import Schedule
from drivetrain_data_efficiency.section import DataEfficiencySection


class DeepSpeedDataSampler:
    """A batch sampler for torch's loader: this rank's samples of each micro-batch by a curriculum.

    The order is that of the engine's own loader for the same section. Every rank computes it, so
    neither a group nor a broadcast is needed.

    Args:
        data_efficiency_config: the section ``data_efficiency``, with an enabled curriculum.
        one_epoch_total_samples: of the data set.
        micro_batch_size: samples of a micro-batch on each rank.
        data_parallel_rank: of this rank among those with other samples.
        data_parallel_size: how many these are.
        data_parallel_group: not needed.
        gradient_accumulation_steps: micro-batches of a step.
        global_rank: not needed.
        drop_last: leave out what fills no micro-batch on every rank.

    Raises:
        ConfigError: the section has no enabled curriculum, or is wrong.
    """

    def __init__(
        self,
        data_efficiency_config: Mapping[str, Any],
        one_epoch_total_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        data_parallel_group: Any = None,
        gradient_accumulation_steps: int = 1,
        global_rank: int = 0,
        drop_last: bool = True,
    ) -> None:
        section = DataEfficiencySection.model_validate(dict(data_efficiency_config))
        if section.curriculum is None:
            raise ConfigError(
                "DeepSpeedDataSampler deals out samples of a curriculum, and the section has none "
                "enabled: set enabled in data_efficiency, data_sampling and curriculum_learning"
            )
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ConfigError(f"there is no rank {data_parallel_rank} of {data_parallel_size}")
        self._round = micro_batch_size * data_parallel_size
        self._rank, self._size, self._drop_last = data_parallel_rank, data_parallel_size, drop_last
        self._order = CurriculumOrder(
            section.curriculum,
            one_epoch_total_samples,
            batch_size=self._round * gradient_accumulation_steps,
            num_epochs=section.data_sampling.num_epochs,
            seed=section.seed,
        )
        self.consumed_samples = 0

    def __len__(self) -> int:
        """Samples of all epochs together."""
        return len(self._order)

    @property
    def curriculum_step(self) -> int:
        """The step, from 1, of the micro-batch that was handed out last."""
        return self._order.step_at(0, max(0, self.consumed_samples - 1))[0]

    @property
    def current_difficulties(self) -> dict[str, int]:
        """Those of :attr:`curriculum_step`."""
        return self._order.difficulties(self.curriculum_step)

    def set_custom_curriculum_learning_schedule(
        self, schedule_func_dict: Mapping[str, Schedule]
    ) -> None:
        """Set functions ``step -> difficulty`` for metrics whose schedule is ``custom``."""
        self._order.set_schedules(schedule_func_dict)

    def get_start_end_idx(self, batch_len: int | None = None) -> tuple[int, int]:
        """This rank's part of the samples of a round."""
        total = self._round if batch_len is None else batch_len
        begin, end = (round(rank * total / self._size) for rank in (self._rank, self._rank + 1))
        return begin, end

    def __iter__(self) -> Iterator[list[int]]:
        rounds = self._order.items(0, self.consumed_samples)
        while batch := [sample for item in islice(rounds, self._round) for sample in item]:
            if len(batch) < self._round and self._drop_last:
                return
            self.consumed_samples += len(batch)
            begin, end = self.get_start_end_idx(len(batch))
            yield batch[begin:end]

    def state_dict(self) -> dict[str, Any]:
        """Plain data, alike on all ranks."""
        return {
            "consumed_samples": self.consumed_samples,
            "curriculum_step": self.curriculum_step,
            "current_difficulties": self.current_difficulties,
            "order": self._order.state_dict(0, self.consumed_samples),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on as another sampler did, also on another number of ranks.

        Raises:
            CheckpointError: the state is DeepSpeed's own, or of other samples.
        """
        if "order" not in state_dict:
            raise CheckpointError(
                "the sampler's state is one of DeepSpeed, which cannot be gone on with: its random "
                "state is not that which it has drawn from; begin the curriculum's pass again"
            )
        self._order.load_state_dict(state_dict["order"])
        self.consumed_samples = int(state_dict["consumed_samples"])
