"""Random streams of model-parallel ranks, by the names that Megatron and DeepSpeed gave them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch

from drivetrain.errors import TrainingError
from drivetrain.job.job import Job, open_jobs

_MODEL_PARALLEL = "model-parallel-rng"
_AXES = ("pp", "dp", "sp", "tp")
_APART = 2718
"""Between a seed and that of its first tensor-parallel rank."""


class ParallelStreams:
    """Named streams of the job that was opened last, on its device.

    They are streams of the job: checkpoints save them, and recomputation repeats them. What is
    seeded before there is a job begins with the first one.
    """

    def __init__(self) -> None:
        self._begun: WeakKeyDictionary[Job, set[str]] = WeakKeyDictionary()
        self._waiting: dict[str, tuple[int, bool]] = {}

    def add(self, name: str, seed: int) -> None:
        """Begin a stream.

        Raises:
            TrainingError: it has begun already.
            ConfigError: the job has another stream of that name.
        """
        if name in self._waiting or (open_jobs() and name in self._names()):
            raise TrainingError(f"the random stream {name!r} has begun already")
        self.begin(name, seed)

    def begin(self, name: str, seed: int, *, apart: bool = False) -> None:
        """Begin a stream, again if it has begun.

        Args:
            name: of the stream.
            seed: of its numbers.
            apart: whether the place among tensor-parallel ranks is added.
        """
        if not open_jobs():
            self._waiting[name] = (seed, apart)
            return
        job = _job()
        job.random.declare(name, _AXES)
        place = job.mesh.coordinate("tp") if apart else 0
        job.random.generator(name).manual_seed(seed + place)
        self._begun.setdefault(job, set()).add(name)

    @contextmanager
    def fork(self, name: str = _MODEL_PARALLEL) -> Iterator[None]:
        """Draw from a stream wherever torch draws from the device's default generator.

        Raises:
            TrainingError: no such stream has begun.
        """
        if name not in self._names():
            known = ", ".join(sorted(self._names())) or "none"
            raise TrainingError(
                f"no random stream {name!r} has begun (there are {known}): call "
                "model_parallel_cuda_manual_seed(seed), or add(name, seed)"
            )
        with _job().random.fork(name):
            yield

    def get_states(self) -> dict[str, torch.Tensor]:
        """State of each stream, by name, to be given to :meth:`set_states`."""
        random = _job().random
        return {name: random.generator(name).get_state() for name in self._names()}

    def set_states(self, states: Mapping[str, torch.Tensor]) -> None:
        """Have streams go on from where :meth:`get_states` was called."""
        for name, state in states.items():
            if name not in self._names():
                self.begin(name, 0)
            _job().random.generator(name).set_state(state)

    def reset(self) -> None:
        """Forget all streams."""
        self._begun.clear()
        self._waiting.clear()

    def _names(self) -> set[str]:
        job = _job()
        for name in list(self._waiting):
            seed, apart = self._waiting.pop(name)
            self.begin(name, seed, apart=apart)
        return self._begun.get(job, set())


_STREAMS = ParallelStreams()


def get_cuda_rng_tracker() -> ParallelStreams:
    """The streams of the job that was opened last, whatever its device."""
    return _STREAMS


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed what a script draws, and begin the stream in which tensor-parallel ranks differ.

    The default generator gets ``seed`` on all ranks, the stream ``model-parallel-rng``
    ``seed + 2718 +`` the rank's place among its tensor-parallel ranks. What an engine's forward
    draws outside of a fork comes from the job's stream ``dropout``, whatever this seed is.
    """
    torch.manual_seed(seed)
    model_parallel_reconfigure_tp_seed(seed)


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """Begin the stream in which tensor-parallel ranks differ, again if it has begun."""
    _STREAMS.begin(_MODEL_PARALLEL, seed + _APART, apart=True)


def _job() -> Job:
    jobs = open_jobs()
    if not jobs:
        raise TrainingError(
            "random streams of model-parallel ranks are drawn from in a job: call "
            "drivetrain.initialize before"
        )
    return jobs[-1]
