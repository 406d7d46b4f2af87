"""Messages between ranks that are rehearsed one after the other.

What travels between them has no values, but for messages on the host by which ranks tell each
other what comes: shapes, of which a stage of a pipeline only knows what the one before it says. A
rank that waits for such a message which its sender has not got to yet is rehearsed again later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from drivetrain.contracts import DONE, CommunicatorWrapper, Kind
from drivetrain.errors import DrivetrainError

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import Collective, Communicator, Handle
    from drivetrain.job.job import Job

Result = TypeVar("Result")


class NotSentYetError(DrivetrainError):
    """A rehearsed rank waits for a message that its sender has not got to yet."""


class Post:
    """Has what rehearsed ranks have told each other.

    Attributes:
        ranks: those that take part, in the order in which they were found.
    """

    def __init__(self) -> None:
        self.ranks = [0]
        self._sent: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
        self._taken: dict[tuple[int, int], int] = {}

    def rehearse(self, run: Callable[[int], Result]) -> list[Result]:
        """Run every rank that messages of rank 0 lead to, each as often as it has to.

        Args:
            run: rehearses the rank with a number.

        Raises:
            DrivetrainError: ranks wait for each other.
        """
        found: dict[int, Result] = {}
        while True:
            before = sum(map(len, self._sent.values())), len(found)
            for rank in list(self.ranks):
                if rank in found:
                    continue
                self._begin(rank)
                try:
                    found[rank] = run(rank)
                except NotSentYetError as error:
                    waits = error
            if len(found) == len(self.ranks):
                return [found[rank] for rank in sorted(found)]
            if before == (sum(map(len, self._sent.values())), len(found)):
                raise waits

    def send(self, tensor: torch.Tensor, source: int, target: int) -> None:
        """Keep what a rank tells another one."""
        self._know(target)
        self._sent[source, target].append(tensor.clone())

    def receive(self, tensor: torch.Tensor, source: int, target: int) -> None:
        """Write what a rank is told next by another one.

        Raises:
            NotSentYetError: that was not rehearsed yet.
        """
        self._know(source)
        key = source, target
        at = self._taken.get(key, 0)
        if at == len(self._sent[key]):
            raise NotSentYetError(f"rank {target} waits for a message of rank {source}")
        self._taken[key] = at + 1
        tensor.copy_(self._sent[key][at])

    def _know(self, rank: int) -> None:
        if rank not in self.ranks:
            self.ranks.append(rank)

    def _begin(self, rank: int) -> None:
        for key in [key for key in self._sent if key[0] == rank]:
            self._sent[key] = []
        for key in [key for key in self._taken if key[1] == rank]:
            self._taken[key] = 0


class RehearsedMessages(CommunicatorWrapper):
    """Carries messages on the host between rehearsed ranks.

    Args:
        inner: the collectives, of ranks that do not exist.
        job: whose.
        post: has the messages.
    """

    def __init__(self, inner: Communicator, job: Job, post: Post) -> None:
        super().__init__(inner)
        self._job, self._post = job, post

    def run(self, collective: Collective) -> Handle:
        tensors = collective.tensors
        if collective.kind is not Kind.SEND_RECEIVE or any(not t.is_cpu for t in tensors):
            return super().run(collective)
        places, own = self._job.mesh.ranks(collective.axis), self._job.rank
        for index, (tensor, peer) in enumerate(zip(tensors, collective.peers, strict=True)):
            if index < collective.sends:
                self._post.send(tensor, own, places[peer])
            else:
                self._post.receive(tensor, places[peer], own)
        return DONE
