"""One bucket of a few named tensors in a home, for tests of update rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from drivetrain.contracts.state.bucket import BucketSpec, Segment, UpdateRule
from drivetrain.contracts.state.home import StateHome
from drivetrain.states.device_home import DeviceHome

Tensors = Mapping[str, torch.Tensor]


def place(
    rule: UpdateRule,
    tensors: Tensors,
    *,
    padding: int = 3,
    master_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
    parameter_dtype: torch.dtype | None = None,
    gradient_dtype: torch.dtype | None = None,
) -> tuple[DeviceHome, torch.Tensor, Callable[[Tensors], torch.Tensor]]:
    """A home over tensors, ready for ``home.update(flatten(gradients), hyper, scale)``.

    Args:
        rule: the rule under test.
        tensors: name -> initial values, of one dtype.
        padding: elements of the bucket after the last tensor.
        master_dtype: dtype of the weights that are updated; that of ``tensors`` if ``None``.
        state_dtype: dtype of the rule's states; the masters' if ``None``.
        parameter_dtype: dtype of the parameters; the masters' if ``None``.
        gradient_dtype: dtype of the gradients; the masters' if ``None``.

    Returns:
        The home; the flat parameters; a function that flattens name -> tensor with padding.
    """
    segments, offset = [], 0
    for name, tensor in tensors.items():
        segments.append(Segment(name, tuple(tensor.shape), 0, tensor.numel(), offset))
        offset += tensor.numel()

    def flatten(values: Tensors) -> torch.Tensor:
        parts = [values[name].flatten() for name in tensors]
        return torch.cat([*parts, torch.zeros(padding, dtype=parts[0].dtype)])

    originals = flatten(tensors)
    master = master_dtype or originals.dtype
    spec = BucketSpec(
        key="b0",
        numel=offset + padding,
        segments=tuple(segments),
        parameter_dtype=parameter_dtype or master,
        gradient_dtype=gradient_dtype or master,
        master_dtype=master,
        state_dtype=state_dtype or master,
        reduction=("dp",),
        rule=rule,
        group=0,
        device=torch.device("cpu"),
    )
    home = DeviceHome(spec)
    flat = originals.to(spec.parameter_dtype).clone()
    home.adopt(flat, originals)
    return home, flat, flatten


def read(home: StateHome, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name -> values of the flat parameters."""
    return {segment.name: segment.of(flat) for segment in home.spec.segments}
