"""Buffers that a forward changes, such as running means, and that its repetition must not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

_Place = tuple[nn.Module, str]
Before = Sequence[tuple[_Place, torch.Tensor]]
"""Values of buffers as they were before a forward."""


class ChangingBuffers:
    """The buffers of a module which its forward changes.

    Which ones these are is found by the first forward in training mode, and the first outside of
    it: there all are compared with what they were. Torch's own count of changes misses those of
    batch normalisation.

    Args:
        module: whose forward is repeated.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._changing: dict[bool, list[_Place]] = {}

    def before(self) -> Before:
        """Copies of the buffers, those that the forward does not change left out once known."""
        places = self._changing.get(self._module.training)
        places = self._all() if places is None else places
        return [((owner, name), owner._buffers[name].clone()) for owner, name in places]  # type: ignore[union-attr]

    def after(self, before: Before) -> Before:
        """What of ``before`` a repetition needs, now that the forward has run."""
        if self._module.training in self._changing:
            return before
        changed = [item for item in before if _differs(*item)]
        self._changing[self._module.training] = [place for place, _ in changed]
        return changed

    @contextmanager
    def repeat(self, before: Before) -> Iterator[None]:
        """Run a forward again on the buffers from before it, without touching those of now.

        They are put in the place of the others rather than copied over them: autograd may have
        saved those.
        """
        now = [owner._buffers[name] for (owner, name), _ in before]
        for (owner, name), value in before:
            owner._buffers[name] = value.clone()  # the graph may be gone through again
        try:
            yield
        finally:
            for ((owner, name), _), value_now in zip(before, now, strict=True):
                owner._buffers[name] = value_now

    def _all(self) -> list[_Place]:
        return [
            (owner, name)
            for owner in self._module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]


def _differs(place: _Place, value: torch.Tensor) -> bool:
    owner, name = place
    now = owner._buffers.get(name)
    return now is None or now.shape != value.shape or not torch.equal(now, value)
