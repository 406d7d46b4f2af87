"""Finding out that ranks wait for each other in different collectives.

gloo notices nothing: a rank that issues one collective more than another waits for it, and the
other waits in the collective that comes next. So a rank that has waited for long writes down what
it has issued of late, and compares that with what the other ranks have written.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed.distributed_c10d import PrefixStore, Store

from drivetrain.contracts.world.collective import Collective, Kind, Tag, axis_name
from drivetrain.errors import CommunicationError

if TYPE_CHECKING:
    from drivetrain.communication.failure import FailureBoard
    from drivetrain.contracts.world.axis import Axis

LONG = timedelta(seconds=2)
"""How long a rank waits in a collective before it compares, and between two comparisons."""

_RECENT = 32
"""Collectives of one group that a rank remembers: more than are under way at once."""

_ASKED = 4
"""Ranks that a rank compares with at a time, so that a large job does not flood the store."""


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
        self._peers = deque(peer for peer in ranks if peer != rank)
        self._count = 0
        self._recent: deque[tuple[int, Kind, Tag, Axis]] = deque(maxlen=_RECENT)

    def note(self, collective: Collective) -> None:
        """``collective`` is issued. Messages between two ranks have no place in the order."""
        if collective.kind not in (Kind.SEND, Kind.RECEIVE):
            self._count += 1
            self._recent.append((self._count, collective.kind, collective.tag, collective.axis))

    def compare(self) -> None:
        """Look whether a rank that waits as well has issued something else.

        Raises:
            CommunicationError: it has, or a rank has failed.
        """
        self._board.check("waiting for a collective")
        own = {
            number: f"{kind} of {tag} over {axis_name(axis)!r}"
            for number, kind, tag, axis in self._recent
        }
        self._store.set(str(self._rank), json.dumps(own))
        # A rank that differs finds out from any other, so few are asked at a time, in turn.
        for peer in tuple(self._peers)[:_ASKED]:
            self._peers.rotate(-1)
            if not self._store.check([str(peer)]):
                continue
            theirs = json.loads(self._store.get(str(peer)))
            for number, what in own.items():
                other = theirs.get(str(number), what)
                if other != what:
                    raise CommunicationError(
                        f"ranks are in different collectives: rank {self._rank} in {what}, rank "
                        f"{peer} in {other}; all ranks have to run as many forward and backward "
                        "passes, and as many steps"
                    )
