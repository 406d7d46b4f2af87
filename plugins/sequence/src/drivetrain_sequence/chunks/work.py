"""What the chunks of one forward of a block have in common, and how a chunk attends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from drivetrain.errors import TrainingError
from drivetrain_sequence.blocks import Gradients, Sight, Sums
from drivetrain_sequence.chunks.alike import Kind, pairs

if TYPE_CHECKING:
    from drivetrain_sequence.blocks import Scoring
    from drivetrain_sequence.chunks.elsewhere import Elsewhere
    from drivetrain_sequence.visible import Seen


Lists = tuple[list[torch.Tensor], ...]
"""Tensors by chunk, of several kinds."""

Sighted = tuple[int, tuple[range, range], tuple[torch.Tensor, ...]]
"""A chunk's number; places of the queries that see it and its own; what was kept of it."""


class KeysKnown(Exception):  # noqa: N818  # no error: ends a chunk's forward, and is caught
    """A chunk's keys are known, which is all that its forward was for.

    Args:
        key: [b, h_kv, c, d].
        value: [b, h_kv, c, d_v].
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.key, self.value = key, value


@dataclass
class Attended:
    """One attention of a block: what its chunks have left, by chunk.

    Args:
        keys: [b, h_kv, c, d].
        values: [b, h_kv, c, d_v].
        results: [b, h, c, d_v].
        lse: [b, h, c], of all scores.
        segments: [b, c], of queries and keys; empty without packing.
        for_keys: gradients so far, in the precision of sums.
        for_values: alike.
    """

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    results: list[torch.Tensor] = field(default_factory=list)
    lse: list[torch.Tensor] = field(default_factory=list)
    segments: list[torch.Tensor] = field(default_factory=list)
    for_keys: list[torch.Tensor] = field(default_factory=list)
    for_values: list[torch.Tensor] = field(default_factory=list)

    def saved(self) -> list[torch.Tensor]:
        """All that backward needs, in an order that ``restored`` knows."""
        return [*self.keys, *self.values, *self.results, *self.lse]

    def restored(self, saved: Sequence[torch.Tensor]) -> Attended:
        """The like of this with what ``saved`` had returned; gradients are still to come."""
        count = len(saved) // 4
        keys, values, results, lse = (list(saved[i * count : (i + 1) * count]) for i in range(4))
        return Attended(keys, values, results, lse, self.segments)


@dataclass
class Work:
    """One forward of a block by chunks, or its backward.

    Keys are known up to a chunk when it attends, if nobody sees keys of chunks to come; each chunk
    then runs once. Otherwise (``keys_first``) a first walk over the chunks stops at attention, and
    leaves keys for the second.

    Args:
        chunks: places of the chunks in the whole sequence.
        elsewhere: where chunks wait.
        calls: attentions of the block.
        now: number of the chunk that is computed.
        call: number of its next attention.
        collecting: the walk that leaves keys is under way.
        keys_first: see above.
        again: a chunk's forward is repeated in backward, and what attention gave is known.
        rehearsed: tensors have no memory.
        group: numbers of the chunks that ``now`` runs for, itself the last of them.
    """

    chunks: list[range]
    elsewhere: Elsewhere
    calls: list[Attended] = field(default_factory=list)
    now: int = 0
    call: int = 0
    collecting: bool = False
    keys_first: bool = False
    again: bool = False
    rehearsed: bool = False
    group: range = range(1)

    def begin(self, group: range) -> None:
        """Compute the last chunk of a group next, for all of it."""
        self.now, self.call, self.group = group[-1], 0, group

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        scoring: Scoring,
        visible: Seen,
        segments: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the chunk's queries to all keys that they see.

        Args:
            query: [b, h, c, d], of all tokens of the chunk.
            key: [b, h_kv, c, d].
            value: [b, h_kv, c, d_v].
            sinks: [h].
            scoring: how scores are made.
            visible: which keys count, but for segments.
            segments: [b, c], of the chunk.

        Returns:
            [b, h, c, d_v].
        """
        state = self._state()
        if self.collecting and self.again:
            raise KeysKnown(key, value)
        if not self.again and len(state.keys) <= self.now:
            self._collect(state, key, value, segments)
            if self.collecting or not visible.causal:
                self.collecting = self.keys_first = True
                raise KeysKnown(key, value)
        if state.segments:
            visible.segments = torch.cat(state.segments, 1)
        arguments = (state, self, scoring, visible)
        output: torch.Tensor = _Attend.apply(query, key, value, sinks, *arguments)  # type: ignore[no-untyped-call]
        return output

    def sighted(self, visible: Seen, lists: Lists) -> Iterator[Sighted]:
        """The chunks of which this one sees something, its own last; see ``alike`` of a rehearsal.

        Args:
            visible: which keys count.
            lists: what is kept of all chunks, and brought of those that are seen.
        """
        seen = self._seen(self.now, visible)
        counted = dict.fromkeys(seen, 1)
        if self.rehearsed:
            counted = pairs(seen, [Counter(self._seen(i, visible).values()) for i in self.group])
        own = self.chunks[self.now]
        came = self.elsewhere.each(
            (tuple(kept[i] for kept in lists) for i in counted), counted.values()
        )
        for (i, times), chunk in zip(counted.items(), came, strict=True):
            with self.elsewhere.alike(times):
                yield i, (own, self.chunks[i]), chunk

    def _seen(self, number: int, visible: Seen) -> dict[int, Kind]:
        """What chunk ``number`` sees, its own last."""
        end = len(self.chunks) if self.keys_first else number
        order = [*(i for i in range(end) if i != number), number]
        own = self.chunks[number]
        found = {
            i: (len(self.chunks[i]), visible.of(own, self.chunks[i]), i == number) for i in order
        }
        return {i: kind for i, kind in found.items() if kind[1] is not Sight.NONE}

    def gradients_of_keys(self, state: Attended) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the chunk's keys and values, from all chunks that have seen them."""
        lists = (state.for_keys[self.now], state.for_values[self.now])
        found = next(self.elsewhere.each([lists]))
        dtypes = (state.keys[self.now].dtype, state.values[self.now].dtype)
        return found[0].to(dtypes[0]), found[1].to(dtypes[1])

    def _state(self) -> Attended:
        if self.call == len(self.calls) and not self.again:
            self.calls.append(Attended())
        self.call += 1
        if self.call > 1 and self.keys_first:
            raise TrainingError(
                "a block attends twice, and not causally, so the keys of its second attention "
                "cannot be known before the queries of its first: leave out sequence_parallel.chunk"
            )
        return self.calls[self.call - 1]

    def _collect(
        self,
        state: Attended,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: torch.Tensor | None,
    ) -> None:
        self.make_room([(state.keys, key), (state.values, value)])
        state.keys.append(self.elsewhere.keep(key))
        state.values.append(self.elsewhere.keep(value))
        if segments is not None:
            state.segments += [segments.detach()] * len(self.group)

    def make_room(self, kept: Sequence[tuple[list[torch.Tensor], torch.Tensor]]) -> None:
        """Keep as much for the chunks that do not run as each tensor takes, in its list."""
        with self.elsewhere.alike(0):
            for found, like in kept:
                found += [self.elsewhere.keep(like) for _ in self.group[:-1]]


class _Attend(torch.autograd.Function):
    """A chunk's attention; repeated in backward it gives what it gave before."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        state: Attended,
        work: Work,
        scoring: Scoring,
        visible: Seen,
    ) -> torch.Tensor:
        now, elsewhere = work.now, work.elsewhere
        if work.again:
            output, lse = next(elsewhere.each([(state.results[now], state.lse[now])]))
        else:
            sums = Sums.none(query, value.shape[-1])
            result = query.new_empty(()).expand(sums.output.shape)
            work.make_room([(state.results, result), (state.lse, sums.lse)])
            for _, runs, (k, v) in work.sighted(visible, (state.keys, state.values)):
                sums.attend(query, k, v, runs, scoring, visible)
            if sinks is not None:
                sums.see_sinks(sinks)
            output, lse = sums.output.to(query.dtype), sums.lse
            state.results.append(elsewhere.keep(output))
            state.lse.append(elsewhere.keep(lse))
        ctx.state, ctx.work, ctx.scoring, ctx.visible, ctx.now = state, work, scoring, visible, now
        ctx.sinks = sinks
        ctx.save_for_backward(query, output, lse)
        # What is kept is nobody's result: views of it could be changed.
        return output.clone() if work.again else output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, output, lse = ctx.saved_tensors
        work, state = ctx.work, ctx.state
        sums = Gradients.of(query, gradient, output, lse)
        if not state.for_keys:
            state.for_keys, state.for_values = (
                [work.elsewhere.zeros(x, lse.dtype) for x in kept]
                for kept in (state.keys, state.values)
            )
        lists = (state.keys, state.values, state.for_keys, state.for_values)
        for i, runs, (k, v, for_k, for_v) in work.sighted(ctx.visible, lists):
            found = sums.attend(query, k, v, runs, ctx.scoring, ctx.visible)
            if found is not None:
                work.elsewhere.add(state.for_keys[i], for_k, found[0])
                work.elsewhere.add(state.for_values[i], for_v, found[1])
        own: list[torch.Tensor | None] = [None, None]
        if not work.keys_first:  # chunks after this one have been there already
            own = list(work.gradients_of_keys(state))
        for_sinks = None if ctx.sinks is None else sums.of_sinks(ctx.sinks)
        return sums.query.to(query.dtype), *own, for_sinks, None, None, None, None
