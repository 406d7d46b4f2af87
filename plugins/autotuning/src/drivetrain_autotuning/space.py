"""The configs that may be tried."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from itertools import product
from typing import Any

from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry
from drivetrain_autotuning.section import PATH, AutotuningSection

Choice = tuple[tuple[str, Any], ...]
"""(config path, value), one for each thing that varies."""

MICRO = "train_micro_batch_size_per_gpu"
STAGE = "zero_optimization.stage"
STEPS = "gradient_accumulation_steps"
_BUCKETS = (50_000_000, 500_000_000)

_AXES = {
    "tensor_parallel": "autotp_size",
    "pipeline": "stages",
    "sequence_parallel_size": "",
    "expert_parallel": "autoep_size",
    "moe": "ep_size",
}
"""Key of a config that shares out a model -> the key in it that says over how many ranks."""


def space_of(
    config: Mapping[str, Any], section: AutotuningSection, ranks: int = 1
) -> dict[str, list[Any]]:
    """Config path -> values to try.

    Stages are those that the config names: a number, a list, or ``"all"``. Models are shared out
    only along axes that the config names, since scripts have to be made for that. What belongs to
    packages that are not installed is left out.

    Args:
        config: of the user.
        section: its section.
        ranks: processes of a trial.
    """
    if section.space:
        return {path: list(values) for path, values in section.space.items()}
    registry = Registry.installed()
    space: dict[str, list[Any]] = {MICRO: _micro_batches(config, section)}
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else None
    if stage is not None:
        space[STAGE] = (
            [0, 1, 2, 3] if stage == "all" else list(stage) if isinstance(stage, list) else [stage]
        )
    if not section.fast:
        if "train_batch_size" not in config:  # else it follows from the micro-batch
            given = config.get(STEPS)
            space[STEPS] = [(given if isinstance(given, int) else 1) * times for times in (1, 2, 4)]
        space |= _axes(config, registry, ranks)
        if registry.find("plugins", "activation_checkpointing") is not None:
            space["activation_checkpointing.recompute"] = ["none", "all"]
        if stage is not None:
            space["zero_optimization.reduce_bucket_size"] = list(_BUCKETS)
            if registry.find("plugins", "zero_optimization.offload_optimizer") is not None:
                space["zero_optimization.offload_optimizer.device"] = ["none", "cpu"]
    return space


def _axes(config: Mapping[str, Any], registry: Registry, ranks: int) -> dict[str, list[Any]]:
    """Over how many ranks the model is shared out, along each axis that the config names."""
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    space: dict[str, list[Any]] = {}
    for section, key in _AXES.items():
        found = config.get(section)
        if found is None or len(sizes) == 1 or registry.find("plugins", section) is None:
            continue
        if section == "tensor_parallel" and isinstance(found, Mapping):
            key = next((k for k in ("tp_size", "tp") if k in found), key)
            key = "tp.tp_size" if key == "tp" else key
        space[f"{section}.{key}".rstrip(".")] = sizes
    return space


def _micro_batches(config: Mapping[str, Any], section: AutotuningSection) -> list[int]:
    given = config.get(MICRO)
    base = given if isinstance(given, int) else section.min_train_micro_batch_size_per_gpu
    largest = section.max_train_micro_batch_size_per_gpu or 8 * base
    sizes = []
    while largest >= section.min_train_micro_batch_size_per_gpu and largest >= 1:
        sizes.append(largest)
        largest //= 2
    return sizes[: section.num_tuning_micro_batch_sizes]


def choices_in(space: Mapping[str, list[Any]]) -> list[Choice]:
    """Every combination."""
    return [tuple(zip(space, values, strict=True)) for values in product(*space.values())]


def config_of(config: Mapping[str, Any], choice: Choice) -> dict[str, Any]:
    """The config of a choice; accumulation is derived where the global batch is given."""
    made = copy.deepcopy(dict(config))
    if "train_batch_size" in made and any(path == MICRO for path, _ in choice):
        made.pop("gradient_accumulation_steps", None)
    for path, value in choice:
        *parents, key = path.split(".")
        place = made
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    return made


def possible(
    config: Mapping[str, Any], choices: list[Choice], ranks: int, section: AutotuningSection
) -> tuple[list[Choice], dict[str, int]]:
    """Choices that a job would run, and why the others are none: reason -> how many."""
    least, most = section.min_train_batch_size, section.max_train_batch_size or math.inf
    left: list[Choice] = []
    reasons: dict[str, int] = {}
    for choice in choices:
        made = config_of(config, choice)
        made.pop(PATH, None)
        try:
            batch = Plan.build(made, world_size=ranks).batch
            size = 0 if batch is None else batch.train_batch_size
            if size and not least <= size <= most:
                raise ConfigError(f"a global batch of {size} is not among {least} to {most}")
        except ConfigError as error:
            reasons[str(error)] = reasons.get(str(error), 0) + 1
        else:
            left.append(choice)
    return left, reasons


def name_of(choice: Choice) -> str:
    """A name for files and tables: initials of keys and values, such as ``s3_tmbspg8``."""
    parts = [f"{initials_of(path)}{value}" for path, value in choice]
    return "_".join(parts).replace("/", "-")


def initials_of(path: str) -> str:
    """The letters that stand for a config path in names."""
    return "".join(word[0] for word in path.split(".")[-1].split("_") if word)
