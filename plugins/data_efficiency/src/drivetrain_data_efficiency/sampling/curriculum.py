"""The order of samples of a curriculum, a function of seed, step and global batch alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from drivetrain.errors import CheckpointError, ConfigError
from drivetrain_data_efficiency.sampling.clusters import Clusters
from drivetrain_data_efficiency.sampling.permutation import seed_of
from drivetrain_data_efficiency.sampling.schedule import Difficulty, Schedule
from drivetrain_data_efficiency.section import CurriculumLearningSection

_EVERY = 64
"""Steps between positions that are kept."""

_KEPT = 64
"""Positions that are kept, so that a loader may have asked for so many steps ahead."""


@dataclass
class _Position:
    """How far each cluster has been dealt out after ``step`` steps."""

    step: int
    dealt: list[int]

    def copy(self) -> _Position:
        return _Position(self.step, list(self.dealt))


class CurriculumOrder:
    """Deals samples out by difficulty: core's ``SampleOrder``.

    For every global batch: (1) the step's difficulties open samples, which form a new cluster; (2)
    it is drawn how many samples come from each cluster, multinomially by the sizes of clusters;
    (3) these are the next ones in the cluster's own random order, which begins anew, shuffled
    otherwise, when the cluster runs out; (4) they are shuffled. Draws are those of a generator of
    the step, so the order depends on seed, step and global batch, and not on ranks. After Li et al.
    2024 (https://arxiv.org/abs/2212.03597), section 3.1.

    Args:
        section: metrics and schedules.
        samples: of the data set.
        batch_size: samples of a step over all ranks.
        num_epochs: the pass ends after so many times the data set.
        seed: of the order.

    Raises:
        ConfigError: files of another data set, or a data set shorter than a batch.
    """

    def __init__(
        self,
        section: CurriculumLearningSection,
        samples: int,
        *,
        batch_size: int,
        num_epochs: int,
        seed: int,
    ) -> None:
        if samples < batch_size:
            raise ConfigError(
                f"the data set has {samples} samples, fewer than a global batch of {batch_size}, "
                "so every step would have some of them twice: lower train_batch_size"
            )
        self._samples, self._batch, self._epochs = samples, batch_size, num_epochs
        self._seed = seed
        metrics = section.curriculum_metrics
        self._difficulties = {name: Difficulty(name, m) for name, m in metrics.items()}
        opening = {name: metric for name, metric in metrics.items() if metric.opens}
        self._clusters = Clusters(opening, samples, section.data_cluster_path, seed)
        self._came: list[int] = []  # for each cluster, the step that it came in with
        self._opened_until = 0
        self._positions: dict[int, _Position] = {0: _Position(0, [])}
        self._base = 0, 0, 0  # (epoch, item, steps before it) from which steps are counted

    def __len__(self) -> int:
        return self._samples * self._epochs

    def set_schedules(self, schedules: Mapping[str, Schedule]) -> None:
        """Set functions of metrics whose schedule is custom.

        Raises:
            ConfigError: a name is no such metric.
        """
        for name, schedule in schedules.items():
            found = self._difficulties.get(name)
            if found is None or found.metric.schedule_type != "custom":
                custom = [n for n, d in self._difficulties.items() if d.schedule is None]
                raise ConfigError(
                    f"data_efficiency: no metric {name!r} has a custom schedule; those that have "
                    f"one: {', '.join(custom) or 'none'}"
                )
            found.schedule = schedule

    def difficulties(self, step: int) -> dict[str, int]:
        """The difficulty of every metric at a step, from 1."""
        return {name: found.at(step) for name, found in self._difficulties.items()}

    def step_at(self, epoch: int, start: int) -> tuple[int, int]:
        """The step, from 1, to which an item of a pass belongs, and its place in the step."""
        began, first, before = self._base
        items = start + (epoch - began) * len(self) - first
        if epoch > began:  # the last step of every pass is cut off by its end
            per_pass = -(-len(self) // self._batch)
            rest = -(-(len(self) - first) // self._batch)
            before, items = before + rest + (epoch - began - 1) * per_pass, start
        return before + items // self._batch + 1, items % self._batch

    def items(self, epoch: int, start: int) -> Iterator[Sequence[int]]:
        """Samples of a pass from a position on, each an item of its own."""
        step, skipped = self.step_at(epoch, start)
        position = self._position(step - 1)
        while start < len(self):
            samples = self._batch_of(position)
            own = samples[skipped : skipped + len(self) - start].tolist()
            yield from ([sample] for sample in own)
            start, skipped = start + len(own), 0

    def state_dict(self, epoch: int, start: int) -> dict[str, Any]:
        """How far each cluster is at the beginning of the step that a position is in."""
        step, place = self.step_at(epoch, start)
        position = self._position(step - 1)
        return {
            "epoch": epoch,
            "start": start - place,
            "step": position.step,
            "dealt": position.dealt,
            "opened": self._clusters.history[: bisect_right(self._came, position.step)],
            "came": self._came[: bisect_right(self._came, position.step)],
            "samples": self._samples,
            "seed": self._seed,
        }

    def load_state_dict(self, state: Any) -> None:
        """Go on as another order did, also with another global batch, from its step on."""
        if not isinstance(state, Mapping) or "dealt" not in state:
            raise CheckpointError(
                "the checkpoint's data loader had no curriculum, and this one has"
            )
        for name, value in (("samples", self._samples), ("seed", self._seed)):
            if state[name] != value:
                raise CheckpointError(
                    f"the curriculum of the checkpoint had {name} {state[name]}, and this one has "
                    f"{value}: other samples would come"
                )
        self._clusters.restore(state["opened"])
        step, dealt = int(state["step"]), [int(n) for n in state["dealt"]]
        self._came, self._opened_until = [int(n) for n in state["came"]], step
        self._positions = {step: _Position(step, dealt)}
        self._base = int(state["epoch"]), int(state["start"]), step

    def _position(self, steps: int) -> _Position:
        """How far clusters are after ``steps`` steps: from the nearest position that is kept."""
        found = [step for step in self._positions if step <= steps]
        if not found:
            first = min(self._positions)
            raise CheckpointError(
                f"the curriculum goes on from step {first}; it cannot go back to step {steps}"
            )
        position = self._positions[max(found)].copy()
        while position.step < steps:
            self._advance(position)
        return position

    def _advance(self, position: _Position) -> tuple[list[int], np.random.Generator]:
        """Go one step on; return how many samples each cluster gives, and the step's generator."""
        if position.step % _EVERY == 0 and position.step not in self._positions:
            self._positions[position.step] = position.copy()
            while len(self._positions) > _KEPT:
                del self._positions[min(self._positions)]
        position.step += 1
        if position.step > self._opened_until:
            self._clusters.open(self.difficulties(position.step))
            self._opened_until = position.step
            self._came += [position.step] * (len(self._clusters.clusters) - len(self._came))
        sizes = self._clusters.sizes()[: bisect_right(self._came, position.step)]
        generator = np.random.default_rng(seed_of("step", self._seed, position.step))
        counts = generator.multinomial(self._batch, sizes / sizes.sum()).tolist()
        before = position.dealt + [0] * (len(counts) - len(position.dealt))
        position.dealt = [a + b for a, b in zip(before, counts, strict=True)]
        return counts, generator

    def _batch_of(self, position: _Position) -> npt.NDArray[np.int64]:
        """The samples of the step after ``position``, which goes on to the step's end; int64."""
        counts, generator = self._advance(position)
        taken = [
            self._clusters.clusters[number].take(position.dealt[number] - count, count)
            for number, count in enumerate(counts)
        ]
        return generator.permutation(np.concatenate(taken))
