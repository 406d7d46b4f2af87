"""A model that visits the device part by part while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from drivetrain.states.units import units


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a model on ``device`` inside of the block, one repeated unit at a time.

    The unit that runs is there, and all that lies outside of units; so a model that is larger than
    the device can be tried before its stages are told apart.

    Args:
        module: its tensors are back where they were after the block.
        device: where it computes.
    """
    blocks = [unit.module for unit in units(module) if unit.module is not module]
    inside = {part for block in blocks for part in block.modules()}
    with ExitStack() as stack:
        stack.enter_context(_moved([p for p in module.modules() if p not in inside], device))
        for block in blocks:
            visit = _Visit(block, device)
            stack.callback(visit.end)
            for hook in (
                block.register_forward_pre_hook(visit.begin),
                block.register_forward_hook(visit.end, always_call=True),
            ):
                stack.callback(hook.remove)
        yield


class _Visit:
    """The time that a unit is on the device."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self._block, self._device, self._stack = block, device, ExitStack()

    def begin(self, *_: Any) -> None:
        self._stack.enter_context(_moved(self._block.modules(), self._device))

    def end(self, *_: Any) -> None:
        self._stack.close()


@contextmanager
def _moved(parts: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Let tensors of ``parts`` themselves be others, on ``device``; not all can take other data."""
    kept = [(part, part._parameters, part._buffers) for part in parts]
    for part, parameters, buffers in kept:
        part._parameters = {
            name: None
            if p is None
            else p
            if p.device == device
            else nn.Parameter(p.to(device), False)
            for name, p in parameters.items()
        }
        part._buffers = {name: None if b is None else b.to(device) for name, b in buffers.items()}
    try:
        yield
    finally:
        for part, parameters, buffers in kept:
            part._parameters, part._buffers = parameters, buffers
