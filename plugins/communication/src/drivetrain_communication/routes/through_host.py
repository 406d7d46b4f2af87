"""Collectives of a device's tensors over something that moves host memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from drivetrain.contracts import Collective, Communicator, CommunicatorWrapper, Handle, Kind
from drivetrain_communication.compress.handles import then


class ThroughHost(CommunicatorWrapper):
    """Copies tensors to the host, lets ``inner`` move them there, and copies back what came.

    Args:
        inner: moves tensors in host memory.
        always: copy those in host memory, too.
    """

    def __init__(self, inner: Communicator, *, always: bool = False) -> None:
        super().__init__(inner)
        self._always = always

    def run(self, collective: Collective) -> Handle:
        c = collective
        away = [t for t in c.tensors if t.device.type != "cpu" or self._always]
        if not away or c.input.is_meta:
            return self.inner.run(c)
        copies: dict[int, torch.Tensor] = {}
        for tensor in c.tensors:
            copies.setdefault(id(tensor), tensor.to("cpu", copy=True))
        there = tuple(copies[id(tensor)] for tensor in c.tensors)
        handle = self.inner.run(replace(c, tensors=there, settled=False))
        came = range(c.sends, len(c.tensors)) if c.kind is Kind.SEND_RECEIVE else range(1)
        pairs = [(c.tensors[number], there[number]) for number in came]
        return then(handle, partial(_bring, pairs), asynchronous=c.asynchronous)


def _bring(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for tensor, copy in pairs:
        tensor.copy_(copy)
