"""Modifiers of the section ``compression_training``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from drivetrain_compression.pruned.blocks import BlockPruning
from drivetrain_compression.pruned.pruning import (
    ChannelPruning,
    HeadPruning,
    RowPruning,
    WeightPruning,
)
from drivetrain_compression.recipe.recipe import make_modifier
from drivetrain_compression.section import PATH, CompressionSection, Group
from drivetrain_compression.training.activations import ActivationQuantisation
from drivetrain_compression.training.base import TrainingModifier
from drivetrain_compression.training.weights import WeightQuantisation

AnyTraining = TrainingModifier[Any]


def modifiers_of(section: CompressionSection) -> list[AnyTraining]:
    """The modifiers that a section switches on, in the order of the section.

    Raises:
        ConfigError: bits or ratios are out of range; names method and group.
    """
    return [*_weights(section), *_activations(section), *_pruning(section)]


def _weights(section: CompressionSection) -> Iterator[AnyTraining]:
    method = section.weight_quantization
    shared = method.shared_parameters
    mixed = shared.fp16_mixed_quantize
    common = {
        "schedule_offset": shared.schedule_offset,
        "quantize_groups": shared.quantize_groups,
        "quantization_type": shared.quantization_type,
        "rounding": shared.rounding,
        "mixed_change_ratio": mixed.quantize_change_ratio if mixed.enabled else 0.0,
        "verbose": shared.quantize_verbose,
    }
    for name, group in _groups(method):
        yield _made(WeightQuantisation, "weight_quantization", name, group, common)


def _activations(section: CompressionSection) -> Iterator[AnyTraining]:
    method = section.activation_quantization
    common = method.shared_parameters.model_dump(exclude={"enabled"})
    for name, group in _groups(method):
        yield _made(ActivationQuantisation, "activation_quantization", name, group, common)


def _pruning(section: CompressionSection) -> Iterator[AnyTraining]:
    sparse = section.sparse_pruning
    shared = sparse.shared_parameters
    if sparse.enabled and shared.method == "snip_momentum":
        yield _blocks(section)
    elif sparse.enabled:
        common: dict[str, Any] = shared.model_dump(include={"method", "schedule_offset"})
        for name, group in _groups(sparse):
            yield _made(WeightPruning, "sparse_pruning", name, group, common)
    parts = {"row_pruning": RowPruning, "head_pruning": HeadPruning}
    for key, kind in {**parts, "channel_pruning": ChannelPruning}.items():
        method = getattr(section, key)
        common = method.shared_parameters.model_dump(exclude={"enabled"}, exclude_none=True)
        for name, group in _groups(method):
            yield _made(kind, key, name, group, common)


def _blocks(section: CompressionSection) -> AnyTraining:
    """One modifier for all groups: the ratio is that of all their weights together."""
    sparse = section.sparse_pruning
    shared = sparse.shared_parameters.model_dump(exclude={"enabled", "method", "excluded_modules"})
    patterns = [p for group in sparse.different_groups.values() for p in group.modules]
    excluded = sparse.shared_parameters.excluded_modules
    config = {**shared, "modules": patterns or ["*"], "exclude": excluded}
    return make_modifier(BlockPruning, config, f"{PATH}.sparse_pruning")  # type: ignore[return-value]


def _groups(method: Any) -> Iterator[tuple[str, Group[Any]]]:
    return iter(method.different_groups.items() if method.enabled else ())


def _made(
    kind: type[AnyTraining], key: str, name: str, group: Group[Any], common: Mapping[str, Any]
) -> AnyTraining:
    own = {"modules": group.modules, "related_modules": group.related_modules}
    config = {**group.params.model_dump(), **common, **own}
    label = f"{PATH}.{key}.different_groups.{name}"
    return make_modifier(kind, config, label)  # type: ignore[return-value]
