"""The loaders that this package builds: core's, with another order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import IterableDataset

from drivetrain.contracts import LoaderRequest
from drivetrain.engine.loader import DataLoader
from drivetrain.errors import ConfigError
from drivetrain_data_efficiency.analysis.fingerprint import check_fingerprints
from drivetrain_data_efficiency.sampling.curriculum import CurriculumOrder
from drivetrain_data_efficiency.section import CurriculumLearningSection, DataEfficiencySection

if TYPE_CHECKING:
    from drivetrain.job.job import Job

PostProcess = Callable[[Any, dict[str, Any]], Any]
"""Takes a micro-batch and the sampler's state, whose ``current_difficulties`` are the step's."""


class Curriculum:
    """The curriculum of one loader, and what is done to its micro-batches.

    Args:
        section: metrics and schedules.
        order: of samples.
    """

    def __init__(self, section: CurriculumLearningSection, order: CurriculumOrder) -> None:
        self.order = order
        self.post_process: PostProcess | None = None
        self.current: dict[str, int] = {}
        """Difficulties of the micro-batch that was handed out last."""
        metrics = section.curriculum_metrics.items()
        self._truncating = [name for name, metric in metrics if metric.truncate]

    def finish(self, batch: Any, epoch: int, start: int) -> Any:
        """Cut a micro-batch to the step's difficulties; then call the script's function."""
        step, _ = self.order.step_at(epoch, start)
        self.current = self.order.difficulties(step)
        for name in self._truncating:
            batch = truncated(batch, self.current[name])
        if self.post_process is not None:
            state = {"curriculum_step": step, "current_difficulties": dict(self.current)}
            batch = self.post_process(batch, state)
        return batch


curricula: WeakKeyDictionary[Any, Curriculum] = WeakKeyDictionary()
"""The curriculum of a loader."""


def truncated(batch: Any, length: int) -> Any:
    """Cut dimension 1 of every tensor of a batch that has two dimensions or more to a length."""

    def cut(leaf: Any) -> Any:
        if not torch.is_tensor(leaf) or leaf.dim() < 2 or leaf.shape[1] <= length:
            return leaf
        return leaf[:, :length].contiguous()

    return pytree.tree_map(cut, batch)


def build_loader(
    job: Job, request: LoaderRequest, section: DataEfficiencySection
) -> DataLoader | None:
    """The loader of a request, or ``None`` if the package has nothing to say about it.

    Raises:
        ConfigError: the data set has no numbers, or does not fit the metrics' files.
    """
    if request.route != "train" or request.order is not None or not section.samples:
        return None
    chosen = section.curriculum or section.batching
    if chosen is None:
        return None
    name = "curriculum_learning" if section.curriculum else "dynamic_batching"
    path = f"data_efficiency.data_sampling.{name}"
    if request.sampler is not None:
        raise ConfigError(f"{path} decides which samples come when, so a sampler has no place")
    if isinstance(request.dataset, IterableDataset) or not hasattr(request.dataset, "__getitem__"):
        raise ConfigError(
            f"{path} needs a data set with numbered samples (__len__ and __getitem__), and "
            f"{type(request.dataset).__name__} is a stream or a loader"
        )
    sampling = section.data_sampling
    fields: dict[str, Any] = {"num_workers": request.num_workers or sampling.num_workers}
    fields["pin_memory"] = request.pin_memory and sampling.pin_memory
    request = replace(request, **fields)
    if section.curriculum is not None:
        return _with_curriculum(job, request, section, section.curriculum)
    from drivetrain_data_efficiency.sampling.token_batches import token_loader

    return token_loader(job, request, section)


def _with_curriculum(
    job: Job,
    request: LoaderRequest,
    section: DataEfficiencySection,
    own: CurriculumLearningSection,
) -> DataLoader:
    check_fingerprints(own.curriculum_metrics, request.dataset)
    batch = job.plan.batch
    assert batch is not None
    order = CurriculumOrder(
        own,
        len(request.dataset),
        batch_size=batch.train_batch_size,
        num_epochs=section.data_sampling.num_epochs,
        seed=section.seed,
    )
    curriculum = Curriculum(own, order)
    loader = DataLoader(replace(request, order=order, finish=curriculum.finish))
    curricula[loader] = curriculum
    return loader


def curriculum_of(engine: Any) -> Curriculum | None:
    """The curriculum of an engine's own training loader, if it has one."""
    loader = engine.training_dataloader
    return None if loader is None else curricula.get(loader)


def set_custom_curriculum_learning_schedule(engine: Any, schedules: Mapping[str, Any]) -> None:
    """Set functions ``step -> difficulty`` for metrics whose schedule is ``custom``.

    Args:
        engine: one with ``training_data`` and a curriculum.
        schedules: name of a metric -> its function, alike on all ranks; step from 1.

    Raises:
        ConfigError: the engine has no curriculum, or no such metric is ``custom``.
    """
    _required(engine, "set_custom_curriculum_learning_schedule").order.set_schedules(schedules)


def set_data_post_process_func(engine: Any, function: PostProcess) -> None:
    """Have ``function(batch, state)`` change every micro-batch of the engine's training loader.

    Args:
        engine: one with ``training_data`` and a curriculum.
        function: gets ``state["current_difficulties"]``, name of a metric -> difficulty of the
            step, and ``state["curriculum_step"]``.

    Raises:
        ConfigError: the engine has no curriculum.
    """
    _required(engine, "set_data_post_process_func").post_process = function


def current_difficulties(engine: Any) -> dict[str, int]:
    """Difficulties of the latest micro-batch of an engine's own loader; empty without any."""
    found = curriculum_of(engine)
    return {} if found is None else dict(found.current)


def _required(engine: Any, what: str) -> Curriculum:
    found = curriculum_of(engine)
    if found is None:
        raise ConfigError(
            f"{what} needs training_data given to initialize, and a config with data_efficiency, "
            "data_sampling and curriculum_learning enabled"
        )
    return found
