"""Finding out that ranks wait for each other in different collectives.

gloo notices nothing: a rank that issues one collective more than another waits for it, and the
other waits in the collective that comes next. So a rank that has waited for long writes down what
it has issued of late, and compares that with what the other ranks have written. Messages between
two ranks are numbered for each pair; what the sender calls one must be what the receiver calls it.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter, deque
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

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


class Issued:
    """What one rank has issued on one process group.

    Args:
        board: tells of failures, and has the store in which ranks compare; ``None`` to not compare.
        rank: this rank.
        ranks: all ranks of the group.
    """

    def __init__(self, board: FailureBoard | None, rank: int, ranks: Sequence[int]) -> None:
        self.board = board
        self._place = f"issued/{'-'.join(map(str, ranks))}"
        self._rank = rank
        self._ranks = ranks
        self._peers = deque(peer for peer in ranks if peer != rank)
        self._count = 0
        self._recent: deque[tuple[int, Kind, Tag, Axis]] = deque(maxlen=_RECENT)
        self._messages: Counter[tuple[int, int]] = Counter()
        self._recent_messages: deque[tuple[str, str]] = deque(maxlen=_RECENT)

    def note(self, collective: Collective) -> None:
        """``collective`` is issued. Messages between two ranks have no place in the order."""
        if collective.kind is not Kind.SEND_RECEIVE:
            self._count += 1
            self._recent.append((self._count, collective.kind, collective.tag, collective.axis))

    def message(self, tensor: torch.Tensor, peer: int, sent: bool) -> int:
        """A number for one message to or from position ``peer``, the same on both sides.

        It differs if the other side has another size or dtype in that place. gloo would end the
        process of a receiver with too little memory, and leave the rest of it as it is with too
        much; messages whose numbers differ never meet, so both sides wait until they compare.
        """
        pair = (self._rank, self._ranks[peer]) if sent else (self._ranks[peer], self._rank)
        self._messages[pair] += 1
        name = f"message {self._messages[pair]} from rank {pair[0]} to rank {pair[1]}"
        what = f"{tensor.numel()} x {str(tensor.dtype).removeprefix('torch.')}"
        self._recent_messages.append((name, what))
        return zlib.crc32(f"{name}: {what}".encode()) & 0x7FFFFFFF

    def compare(self) -> None:
        """Look whether a rank that waits as well has issued something else.

        Raises:
            CommunicationError: it has, or a rank has failed.
        """
        assert self.board is not None
        self.board.check("waiting for a collective")
        store: Store = PrefixStore(self._place, self.board.store)
        own = {
            str(number): f"{kind} of {tag} over {axis_name(axis)!r}"
            for number, kind, tag, axis in self._recent
        } | dict(self._recent_messages)
        store.set(str(self._rank), json.dumps(own))
        # A rank that differs finds out from any other, so few are asked at a time, in turn.
        for peer in tuple(self._peers)[:_ASKED]:
            self._peers.rotate(-1)
            if not store.check([str(peer)]):
                continue
            theirs = json.loads(store.get(str(peer)))
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
