"""What scripts call to have their own functions recomputed, by DeepSpeed's names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from drivetrain.errors import ConfigError
from drivetrain.job.job import Job, open_jobs
from drivetrain_activation_checkpointing.recomputation import Recomputer, Settings, module_of
from drivetrain_activation_checkpointing.section import PATH, ActivationCheckpointingSection
from drivetrain_activation_checkpointing.units import settings_of

_KEYS = {
    "partition_activations": "partition_activations",
    "contiguous_checkpointing": "contiguous_memory_optimization",
    "num_checkpoints": "number_checkpoints",
    "checkpoint_in_cpu": "cpu_checkpointing",
    "synchronize": "synchronize_checkpoint_boundary",
    "profile": "profile",
}
"""Argument of :func:`configure` -> key of the section."""


@dataclass
class _Process:
    """What a script has asked for in this process, and what serves it in each job."""

    changes: dict[str, Any] = field(default_factory=dict)
    configured: bool = False
    mpu: Any = None
    alone: Recomputer = field(default_factory=lambda: Recomputer(None, Settings()))
    jobs: dict[Job, Recomputer] = field(default_factory=dict)

    def recomputer(self) -> Recomputer:
        """That of the job that was opened last; one that only recomputes without a job."""
        if not (jobs := open_jobs()):
            return self.alone
        job = jobs[-1]
        if job not in self.jobs:
            _check_mpu(self.mpu, job)
            section = _changed(job.plan.section(ActivationCheckpointingSection), self.changes)
            self.jobs[job] = Recomputer(job, settings_of(section))
            job.on_close(lambda: self.jobs.pop(job, None))
        return self.jobs[job]

    def change(self, changes: Mapping[str, Any], *, afresh: bool = False) -> None:
        """Change settings from now on; with ``afresh`` forget what was changed before."""
        merged = dict(changes) if afresh else {**self.changes, **changes}
        for job in open_jobs():
            _changed(job.plan.section(ActivationCheckpointingSection), merged)
        self.changes = merged
        self.jobs.clear()


_PROCESS = _Process()


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function, keep its inputs alone, and run it again in backward, re-entrantly.

    Unlike torch's own, it finds gradients of the function's parameters also where no input has
    one, and looks into nested arguments and results.

    Args:
        function: must do the same when it is called again; random draws are repeated.
        args: its arguments.
        kwargs: the same by name.

    Raises:
        TrainingError: the function returns an object that may hold tensors.
    """
    return _run(function, args, kwargs, reentrant=True)


def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As :func:`checkpoint` without a backward inside of backward.

    It serves ``torch.autograd.grad``, a backward through a backward, and any kind of result.
    """
    return _run(function, args, kwargs, reentrant=False)


def configure(
    mpu_: Any | None = None,
    deepspeed_config: Any | None = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Set how :func:`checkpoint` keeps inputs; the config's section says what is not given here.

    Each call begins afresh.

    Args:
        mpu_: must have as many tensor-parallel ranks as the job; ``None`` takes the job's.
        deepspeed_config: a config, or the path of one, whose section counts instead of the job's.
        partition_activations: see the section.
        contiguous_checkpointing: its ``contiguous_memory_optimization``.
        num_checkpoints: its ``number_checkpoints``.
        checkpoint_in_cpu: its ``cpu_checkpointing``.
        synchronize: its ``synchronize_checkpoint_boundary``.
        profile: its ``profile``.

    Raises:
        ConfigError: the settings do not fit together, or ``mpu_`` does not fit the job.
    """
    given = {
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
        "num_checkpoints": num_checkpoints,
        "checkpoint_in_cpu": checkpoint_in_cpu,
        "synchronize": synchronize,
        "profile": profile,
    }
    changes = {
        **_section_of(deepspeed_config),
        **{_KEYS[name]: value for name, value in given.items() if value is not None},
    }
    if open_jobs():
        _check_mpu(mpu_, open_jobs()[-1])
    _PROCESS.change(changes, afresh=True)
    _PROCESS.mpu = mpu_
    _PROCESS.configured = True


def is_configured() -> bool:
    """Whether :func:`configure` was called."""
    return _PROCESS.configured


def reset() -> None:
    """Give up memory that is kept for inputs, and that no graph is using."""
    for recomputer in list(_PROCESS.jobs.values()):
        if recomputer.store is not None:
            recomputer.store.memory.clear()


def set_num_layers(nlayers: int) -> None:
    """Set how many inputs contiguous memory has room for."""
    _PROCESS.change({"number_checkpoints": nlayers})


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Set whether tensor-parallel ranks keep parts of inputs."""
    _PROCESS.change({"partition_activations": partition_activation})


def _run(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, reentrant: bool
) -> Any:
    owner = module_of(function)
    # Closures are made in each forward, from one piece of code.
    key = getattr(function, "__code__", None) or (type(owner), getattr(function, "__name__", ""))
    return _PROCESS.recomputer().run(
        function, args, kwargs, reentrant=reentrant, key=key, owner=owner
    )


def _section_of(config: Any) -> dict[str, Any]:
    """The section of a config that a script has given, without what DeepSpeed would not read."""
    if config is None:
        return {}
    if isinstance(config, (str, os.PathLike, Mapping)):
        from drivetrain.plan.config.loading import load_config

        section = load_config(config).get(PATH) or {}
    else:  # an object with the settings of a job
        section = getattr(config, f"{PATH}_config", None)
        if section is None:
            raise ConfigError(
                f"configure: expected a config or the path of one as deepspeed_config, got a "
                f"{type(config).__name__}"
            )
    read = dict(section) if isinstance(section, Mapping) else vars(section)
    keys = (key for key in _KEYS.values() if read.get(key) is not None)
    return {key: read[key] for key in keys}


def _changed(
    section: ActivationCheckpointingSection, changes: Mapping[str, Any]
) -> ActivationCheckpointingSection:
    from pydantic import ValidationError

    try:
        given = section.model_dump(exclude_unset=True)
        return ActivationCheckpointingSection.model_validate({**given, **changes})
    except ValidationError as error:
        found = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise ConfigError(f"{PATH}: {found}") from error


def _check_mpu(mpu: Any, job: Job) -> None:
    """Refuse an ``mpu`` of other tensor-parallel ranks than the job has."""
    for name in ("get_tensor_model_parallel_world_size", "get_model_parallel_world_size"):
        if mpu is not None and hasattr(mpu, name):
            theirs, ours = getattr(mpu, name)(), job.mesh.size("tp")
            if theirs != ours:
                raise ConfigError(
                    f"configure: mpu_ has {theirs} tensor-parallel ranks, but the job has {ours}: "
                    "give it to drivetrain.initialize, too"
                )
            return
