"""What the spec of a trained bucket says about its states."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from drivetrain.contracts import BucketSpec, StateSpec
from drivetrain.errors import ConfigError
from drivetrain.states.device_home import MASTER

PATH = "zero_optimization.offload_optimizer"


def states_of(spec: BucketSpec) -> Iterable[tuple[StateSpec, torch.dtype]]:
    """The states that the rule of a bucket declares, and their dtypes."""
    assert spec.rule is not None, f"bucket {spec.key} is not trained"
    return [(state, state.dtype or spec.state_dtype) for state in spec.rule.states(spec)]


def kinds_of(spec: BucketSpec) -> dict[str, torch.dtype]:
    """What is kept of every element: kind, as fragments name it, -> dtype."""
    kinds = {MASTER: spec.master_dtype} if spec.has_masters else {}
    return kinds | {state.name: dtype for state, dtype in states_of(spec) if state.numel is None}


def bytes_per_element(spec: BucketSpec) -> int:
    """Bytes of a bucket's masters, where it has any, and states, for each of its elements."""
    return sum(dtype.itemsize for dtype in kinds_of(spec).values())


def state_bytes(spec: BucketSpec) -> int:
    """Bytes of a bucket's masters, where it has any, and optimizer states."""
    of_bucket = sum((s.numel or 0) * dtype.itemsize for s, dtype in states_of(spec))
    return spec.numel * bytes_per_element(spec) + of_bucket


def keeps_of_bucket(spec: BucketSpec) -> bool:
    """Whether the rule keeps something of a bucket as a whole."""
    return any(state.numel is not None for state, _ in states_of(spec))


def refuse_communicating(specs: Iterable[BucketSpec]) -> None:
    """Refuse rules that communicate: they do so from the device's memory, on the rank's own thread.

    Raises:
        ConfigError: there is one.
    """
    for spec in specs:
        assert spec.rule is not None, f"bucket {spec.key} is not trained"
        if spec.rule.communicates:
            raise ConfigError(
                f"{PATH}: the optimizer {type(spec.rule).__name__} communicates "
                "gradients by itself, so its states cannot leave the device; use device none, or "
                "another optimizer.type"
            )
