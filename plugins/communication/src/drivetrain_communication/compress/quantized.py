"""Collectives as exchanges of quantised blocks.

Sums are made in fp32 where messages arrive. Where a collective takes two hops, the first is waited
for at once, because all ranks have to begin the second in the same order.
"""

from __future__ import annotations

from functools import partial

import torch

from drivetrain.contracts import Collective, Communicator, Handle, Kind
from drivetrain_communication.compress.blocks import BlockCodec
from drivetrain_communication.compress.errors import Errors, finite
from drivetrain_communication.compress.handles import then


class Quantized:
    """All-reduce, reduce-scatter, all-gather and all-to-all of quantised blocks.

    - *all-reduce*: each rank sends slice i of its tensor to rank i, which adds them up, quantises
      the sum again and sends it to all. All ranks decode the same messages, so they have the same
      bits.
    - *reduce-scatter*: the first half of that.
    - *all-gather*: every rank decodes all messages, its own included.
    - *all-to-all*: each slice is quantised by itself.

    With error feedback each rank keeps what quantising has left out, and the server of a slice as
    well; it is added to the next tensor of the same name. Over any number of steps the sum of what
    was sent then differs from the sum of what was meant by the last error alone.

    Args:
        codec: turns rows into messages.
        errors: keeps errors; ``None`` for no feedback.
    """

    kinds = frozenset({Kind.ALL_REDUCE, Kind.REDUCE_SCATTER, Kind.ALL_GATHER, Kind.ALL_TO_ALL})

    def __init__(self, codec: BlockCodec, errors: Errors | None) -> None:
        self._codec = codec
        self._errors = errors

    def sent_bytes(self, collective: Collective, size: int) -> int:
        """About the size of what is sent in place of the tensor itself."""
        if collective.kind is Kind.ALL_TO_ALL:
            return size * self._codec.message_bytes(-(-collective.input.numel() // size))
        numel = collective.input.numel()
        if collective.kind is Kind.ALL_GATHER:
            return self._codec.message_bytes(numel)
        return size * self._codec.message_bytes(-(-numel // size))

    def run(self, collective: Collective, inner: Communicator, name: str) -> Handle:
        """Carry out ``collective`` over ``inner``; ``name`` is its tensor's, for errors."""
        run = {
            Kind.ALL_REDUCE: self._all_reduce,
            Kind.REDUCE_SCATTER: self._reduce_scatter,
            Kind.ALL_GATHER: self._all_gather,
            Kind.ALL_TO_ALL: self._all_to_all,
        }[collective.kind]
        return run(collective, inner, name)

    def _all_reduce(self, c: Collective, inner: Communicator, name: str) -> Handle:
        flat, size = c.output.view(-1), inner.size(c.axis)
        chunk = self._codec.padded(-(-flat.numel() // size))
        rows = flat.new_zeros(size * chunk, dtype=torch.float32)
        rows[: flat.numel()] = flat
        sent = self._encode(rows.view(size, chunk), f"{name}, worker")
        received = torch.empty_like(sent)
        inner.all_to_all(received, sent, c.axis, c.tag)
        total = self._codec.decode(received, chunk).sum(0, keepdim=True)
        own = self._encode(total, f"{name}, server")
        gathered = own.new_empty(size * own.numel())
        handle = inner.all_gather(
            gathered, own.view(-1), c.axis, c.tag, asynchronous=c.asynchronous
        )
        messages = gathered.view(size, -1)
        finish = partial(self._put, messages, chunk, flat)
        return then(handle, finish, asynchronous=c.asynchronous)

    def _put(self, messages: torch.Tensor, chunk: int, flat: torch.Tensor) -> None:
        flat.copy_(self._codec.decode(messages, chunk).reshape(-1)[: flat.numel()])

    def _reduce_scatter(self, c: Collective, inner: Communicator, name: str) -> Handle:
        size, output = inner.size(c.axis), c.output.view(-1)
        sent = self._encode(c.input.view(size, -1).float(), f"{name}, worker")
        received = torch.empty_like(sent)
        handle = inner.all_to_all(received, sent, c.axis, c.tag, asynchronous=c.asynchronous)

        def finish() -> None:
            output.copy_(self._codec.decode(received, output.numel()).sum(0))

        return then(handle, finish, asynchronous=c.asynchronous)

    def _all_gather(self, c: Collective, inner: Communicator, name: str) -> Handle:
        size, output = inner.size(c.axis), c.output.view(-1)
        own = self._codec.encode(c.input.reshape(1, -1).float())
        gathered = own.new_empty(size * own.numel())
        handle = inner.all_gather(
            gathered, own.view(-1), c.axis, c.tag, asynchronous=c.asynchronous
        )
        finish = partial(self._put, gathered.view(size, -1), c.input.numel(), output)
        return then(handle, finish, asynchronous=c.asynchronous)

    def _all_to_all(self, c: Collective, inner: Communicator, name: str) -> Handle:
        size = inner.size(c.axis)
        outgoing = _numels(c.input, c.input_splits, size)
        incoming = _numels(c.output, c.output_splits, size)
        parts = c.input.reshape(-1).float().split(outgoing)  # type: ignore[no-untyped-call]
        sent = torch.cat([self._codec.encode(part.view(1, -1)).view(-1) for part in parts])
        lengths = [self._codec.message_bytes(numel) for numel in incoming]
        received = sent.new_empty(sum(lengths))
        handle = inner.all_to_all(
            received,
            sent,
            c.axis,
            c.tag,
            output_splits=lengths,
            input_splits=[self._codec.message_bytes(numel) for numel in outgoing],
            asynchronous=c.asynchronous,
        )

        def finish() -> None:
            places = c.output.view(-1).split(incoming)  # type: ignore[no-untyped-call]
            for place, message in zip(places, torch.split(received, lengths), strict=True):
                place.copy_(self._codec.decode(message.view(1, -1), place.numel()).view(-1))

        return then(handle, finish, asynchronous=c.asynchronous)

    def _encode(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        """Messages of ``rows`` [k, n], with what was left out of those before, if that is kept."""
        if self._errors is None:
            return self._codec.encode(rows)
        error = self._errors.of(name, tuple(rows.shape), rows.device)
        wanted = rows + error
        messages = self._codec.encode(wanted)
        error.copy_(finite(wanted.sub_(self._codec.decode(messages, rows.shape[1]))))
        return messages


def _numels(tensor: torch.Tensor, splits: object, size: int) -> list[int]:
    """Elements of the slice of each rank."""
    if splits is None:
        return [tensor.numel() // size] * size
    row = tensor[:1].numel() if len(tensor) else 0
    assert isinstance(splits, (list, tuple))
    return [row * rows for rows in splits]
