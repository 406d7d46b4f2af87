"""Whole values of what engines keep in parts: the client's tensors, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import Fragment, Purpose, Tag

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job

Values = dict[str, torch.Tensor]
"""Parameter name -> whole tensor in float64, on the host."""


def whole_weights(engine: Engine, shapes: Mapping[str, torch.Size]) -> Values:
    """Masters where there are some, else parameters. Collective."""
    engine.states.flush()
    fragments = [f for f in engine.states.fragments() if f.kind in ("parameter", "master")]
    masters = {f.name for f in fragments if f.kind == "master"}
    told = torch.tensor([name in masters for name in shapes], dtype=torch.int32)
    told = told.to(engine.device)
    tag = Tag(Purpose.CONTROL, site="masters to verify")
    engine.job.communicator.all_reduce(told, "world", tag)  # a rank may hold no part of one
    kinds = {name: "master" if one else "parameter" for name, one in zip(shapes, told, strict=True)}
    wanted = [f for f in fragments if kinds.get(f.name) == f.kind]
    return _put_together(engine.job, wanted, shapes)


def whole_gradients(engine: Engine, shapes: Mapping[str, torch.Size]) -> Values | None:
    """Sums over ranks and micro-batches; ``None`` where the optimizer sums by itself. Collective.

    They are read after the last backward of a window and before its update.
    """
    factor = engine.states.complete_gradients()
    if factor is None:
        return None
    wanted = [f for f in engine.states.fragments() if f.kind == "gradient" and f.name in shapes]
    found = _put_together(engine.job, wanted, shapes)
    return {name: value * factor for name, value in found.items()}


def _put_together(
    job: Job, fragments: Iterable[Fragment], shapes: Mapping[str, torch.Size]
) -> Values:
    found = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for fragment in fragments:
        if not fragment.owner or not fragment.boxes:
            continue
        flat = fragment.read().detach().cpu().double()
        for box in fragment.boxes:
            box.of(found[fragment.name]).copy_(box.of_storage(flat))
    tag = Tag(Purpose.CONTROL, site="values to verify")
    for name, value in found.items():
        travelling = value.to(job.device)
        job.communicator.all_reduce(travelling, "world", tag)
        found[name] = travelling.cpu()
    return found
