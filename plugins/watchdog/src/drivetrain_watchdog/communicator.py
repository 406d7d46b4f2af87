"""The layer of the communicator that writes down what is issued, and marks what is waited for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from drivetrain.contracts import (
    DONE,
    Collective,
    Communicator,
    CommunicatorWrapper,
    Handle,
    Kind,
)
from drivetrain.errors import CommunicationError
from drivetrain_watchdog.history import History, fingerprint, name_of, tensor_text, text_of
from drivetrain_watchdog.watch import Wait

if TYPE_CHECKING:
    from drivetrain.contracts import Axis
    from drivetrain_watchdog.watch import Watch


class _Group:
    """The ranks along an axis.

    Args:
        name: what the group is called in the store.
        ranks: in order of position.
        history: of its collectives, whatever the axis is called.
    """

    __slots__ = ("history", "name", "ranks")

    def __init__(self, name: str, ranks: Sequence[int], history: History) -> None:
        self.name, self.ranks, self.history = name, ranks, history


class WatchedCommunicator(CommunicatorWrapper):
    """Hands every collective on, once it is written down.

    Collectives over one rank are left out, and gathers that a rank reads alone (settled ones in
    shared memory): ranks do not meet there, and may do so in different orders.

    Args:
        inner: the communicator to watch.
        watch: compares with other ranks.
        ranks: answers the ranks along an axis.
    """

    def __init__(
        self, inner: Communicator, watch: Watch, ranks: Callable[[Axis], Sequence[int]]
    ) -> None:
        super().__init__(inner)
        self._watch = watch
        self._ranks = ranks
        self._groups: dict[Axis, _Group | None] = {}

    def run(self, collective: Collective) -> Handle:
        self._watch.refuse()
        axis = collective.axis
        group = self._groups[axis] if axis in self._groups else self._open(axis)
        if group is None or (
            collective.settled and self.inner.reads_settled(collective.input, axis)
        ):
            return self.inner.run(collective)
        if collective.kind is Kind.SEND_RECEIVE:
            wait = self._note_messages(collective, group)
        else:
            wait = self._note(collective, group)
        watch = self._watch
        watch.begin(wait)
        try:
            watch.tell_ahead()
            handle = self.inner.run(collective)
        except CommunicationError as error:
            raise watch.explain(error, wait) from error
        finally:
            watch.end()
        return handle if handle is DONE else _Watched(handle, watch, wait)

    def _note(self, c: Collective, group: _Group) -> Wait:
        watch = self._watch
        number = watch.words.number(fingerprint(c), lambda: text_of(c))
        where = watch.where.now
        count = group.history.add(number, where)
        # Not every rank waits for every other in a broadcast, or where some exchange no rows.
        waits_for_all = c.kind is not Kind.BROADCAST and c.input_splits is None
        return Wait(number, where, {group.name: count}, waits_for_all)

    def _note_messages(self, c: Collective, group: _Group) -> Wait:
        watch = self._watch
        where, needs, number = watch.where.now, {}, -1
        own = group.ranks[self.inner.rank(c.axis)]
        for place, (tensor, position) in enumerate(zip(c.tensors, c.peers, strict=True)):
            if not 0 <= position < len(group.ranks):
                continue  # refused inside
            peer = group.ranks[position]
            name = f"{own}>{peer}" if place < c.sends else f"{peer}>{own}"
            shape, dtype = tensor.shape, tensor.dtype
            words = lambda d=dtype, s=shape: tensor_text(d, s)  # noqa: E731
            number = watch.words.number((dtype, shape), words)
            needs[name] = watch.history(name).add(number, where)
        said = watch.words.number((c.kind, c.tag, c.axis), lambda: str(c))
        return Wait(said, where, needs, True)

    def _open(self, axis: Axis) -> _Group | None:
        ranks = tuple(self._ranks(axis))
        name = name_of(ranks)
        group = None if len(ranks) == 1 else _Group(name, ranks, self._watch.history(name))
        self._groups[axis] = group
        return group


class _Watched:
    """The handle of a collective under way."""

    __slots__ = ("_handle", "_wait", "_watch")

    def __init__(self, handle: Handle, watch: Watch, wait: Wait) -> None:
        self._handle, self._watch, self._wait = handle, watch, wait

    def wait(self) -> None:
        self._watch.begin(self._wait)
        try:
            self._handle.wait()
        except CommunicationError as error:
            raise self._watch.explain(error, self._wait) from error
        finally:
            self._watch.end()
