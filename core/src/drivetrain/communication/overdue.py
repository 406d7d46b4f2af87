"""Finding out that ranks wait for each other in different collectives.

gloo notices nothing: a rank that issues one collective more than another waits for it, and the
other waits in the collective that comes next. So a rank that has waited for long writes down what
it has issued of late, and compares that with what the other ranks have written. Messages between
two ranks are numbered for each pair; what the sender calls one must be what the receiver calls it.

A message that the other side never issues is found as a circle: ranks each of which waits for the
next to issue something. A rank that waits issues nothing, so there is no way out of a circle, even
though ranks write down at different times: whoever left the circle first would have to have been
given what another one had not issued, by one that waited throughout.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch.distributed.distributed_c10d import PrefixStore, Store

from drivetrain.contracts.world.collective import Collective, Kind, Tag, axis_name
from drivetrain.errors import CommunicationError

if TYPE_CHECKING:
    import torch

    from drivetrain.communication.failure import FailureBoard
    from drivetrain.contracts.world.axis import Axis

LONG = timedelta(seconds=2)
"""How long a rank waits in a collective before it compares, and between two comparisons."""

_RECENT = 32
"""Collectives of one group that a rank remembers: more than are under way at once."""

_ASKED = 4
"""Ranks that a rank compares with at a time, so that a large job does not flood the store."""

_IN_CIRCLE = 64
"""Ranks whose records one rank reads at a time to find who waits for whom."""

_COLLECTIVES = ""
"""Collectives are counted under this name, messages under ``"<from>><to>"``."""


class Issued:
    """What one rank has issued on one process group.

    Args:
        board: tells of failures, and has the store in which ranks compare.
        rank: this rank.
        ranks: all ranks of the group.
    """

    def __init__(self, board: FailureBoard, rank: int, ranks: Sequence[int]) -> None:
        self._board = board
        name = "-".join(map(str, ranks))
        self._store: Store = PrefixStore(f"issued/{name}", board.store)
        self._rank = rank
        self._ranks = ranks
        self._peers = deque(peer for peer in ranks if peer != rank)
        self._counts: Counter[str] = Counter()
        self._recent: deque[tuple[int, Kind, Tag, Axis]] = deque(maxlen=_RECENT)
        self._recent_messages: deque[tuple[str, str]] = deque(maxlen=_RECENT)

    @classmethod
    def of(cls, board: FailureBoard, rank: int, ranks: Sequence[int]) -> Issued:
        """The one object for ``ranks``: whatever carries them, collectives have one order."""
        return board.issued.setdefault(tuple(ranks), cls(board, rank, ranks))

    def note(self, collective: Collective) -> dict[str, int]:
        """``collective`` is issued. Messages between two ranks have no place in the order.

        Answers how much the others have to have issued, by name, before it can end.
        """
        if collective.kind is Kind.SEND_RECEIVE:
            ways = enumerate(collective.peers)
            pairs = [self._pair(peer, number < collective.sends) for number, peer in ways]
            return {pair: self._counts[pair] for pair in pairs}
        self._counts[_COLLECTIVES] += 1
        count = self._counts[_COLLECTIVES]
        self._recent.append((count, collective.kind, collective.tag, collective.axis))
        # Not every rank waits for every other in a broadcast, or where some exchange no rows.
        waits_for_some = collective.kind is Kind.BROADCAST or collective.input_splits is not None
        return {} if waits_for_some else {_COLLECTIVES: count}

    def message(self, tensor: torch.Tensor, peer: int, sent: bool) -> int:
        """A number for one message to or from position ``peer``, the same on both sides.

        It differs if the other side has another size or dtype in that place. gloo would end the
        process of a receiver with too little memory, and leave the rest of it as it is with too
        much; messages whose numbers differ never meet, so both sides wait until they compare.
        """
        pair = self._pair(peer, sent)
        self._counts[pair] += 1
        name = _called(pair, self._counts[pair])
        what = f"{tensor.numel()} x {str(tensor.dtype).removeprefix('torch.')}"
        self._recent_messages.append((name, what))
        return zlib.crc32(f"{name}: {what}".encode()) & 0x7FFFFFFF

    def _pair(self, peer: int, sent: bool) -> str:
        pair = (self._rank, self._ranks[peer])
        return f"{pair[0]}>{pair[1]}" if sent else f"{pair[1]}>{pair[0]}"

    def compare(self, needs: dict[str, int]) -> None:
        """Look whether a rank that waits as well has issued something else.

        Args:
            needs: what :meth:`note` has answered for the collective that is waited for.

        Raises:
            CommunicationError: it has, or a rank has failed.
        """
        self._board.check("waiting for a collective")
        own = {
            str(number): f"{kind} of {tag} over {axis_name(axis)!r}"
            for number, kind, tag, axis in list(self._recent)  # others may note meanwhile
        } | dict(self._recent_messages)
        record = {"issued": own, "counts": self._counts, "needs": needs}
        self._store.set(str(self._rank), json.dumps(record))
        # A rank that differs finds out from any other, so few are asked at a time, in turn.
        for peer in tuple(self._peers)[:_ASKED]:
            self._peers.rotate(-1)
            if not self._store.check([str(peer)]):
                continue
            theirs = json.loads(self._store.get(str(peer)))["issued"]
            for name, what in own.items():
                other = theirs.get(name, what)
                if other != what and name.startswith("message"):
                    raise CommunicationError(
                        f"{name} is {what} on rank {self._rank}, {other} on rank {peer}; both have "
                        "to send and receive the same shapes in the same order"
                    )
                if other != what:
                    raise CommunicationError(
                        f"ranks are in different collectives: rank {self._rank} in {what}, rank "
                        f"{peer} in {other}; all ranks have to run as many forward and backward "
                        "passes, and as many steps"
                    )
        if needs.keys() - {_COLLECTIVES}:
            self._find_circle(record)

    def _find_circle(self, own: dict[str, Any]) -> None:
        """Go from each rank to those that have not issued what it waits for, back to this one."""
        known = {self._rank: own}
        reached: set[int] = set()
        ways: deque[tuple[int, list[str]]] = deque([(self._rank, [])])
        while ways:
            rank, way = ways.popleft()
            for peer, name, number in self._needed(rank, known[rank]["needs"]):
                if peer not in known:
                    if len(known) == _IN_CIRCLE or not self._store.check([str(peer)]):
                        continue
                    known[peer] = json.loads(self._store.get(str(peer)))
                if peer in reached or known[peer]["counts"].get(name, 0) >= number:
                    continue
                reached.add(peer)
                step = f"rank {rank} for {_called(name, number)} on rank {peer}"
                if peer == self._rank:
                    raise CommunicationError(
                        f"ranks wait for each other: {', '.join([*way, step])}; what they exchange "
                        "at one time belongs into one send_receive"
                    )
                ways.append((peer, [*way, step]))

    def _needed(self, rank: int, needs: dict[str, int]) -> Iterator[tuple[int, str, int]]:
        """Who has to issue what before what ``rank`` waits for can end."""
        for name, number in needs.items():
            peers = self._ranks if name == _COLLECTIVES else map(int, name.split(">"))
            yield from ((peer, name, number) for peer in peers if peer != rank)


def _called(name: str, number: int) -> str:
    """How messages call what is counted."""
    if name == _COLLECTIVES:
        return f"collective {number}"
    source, to = name.split(">")
    return f"message {number} from rank {source} to rank {to}"
