"""One bucket of a few named tensors in a home, for tests of update rules."""

from __future__ import annotations

import torch

from drivetrain.home import BucketSpec, DeviceHome, Segment


def place(
    rule,
    tensors,
    *,
    padding=3,
    master_dtype=None,
    state_dtype=None,
    parameter_dtype=None,
    gradient_dtype=None,
):
    """A home over ``tensors`` (name -> initial values), and its flat parameters.

    Returns:
        The home; the flat parameters; a function that flattens name -> tensor with padding.
    """
    segments, offset = [], 0
    for name, tensor in tensors.items():
        segments.append(Segment(name, tuple(tensor.shape), 0, tensor.numel(), offset))
        offset += tensor.numel()

    def flatten(values):
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


def read(home, flat):
    """Name -> values of the flat parameters."""
    return {segment.name: segment.of(flat) for segment in home.spec.segments}
