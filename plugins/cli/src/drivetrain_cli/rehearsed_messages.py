"""Messages between ranks that are rehearsed one after the other.

What travels between them has no values, but for messages on the host by which ranks tell each
other what comes: shapes, of which a stage of a pipeline only knows what the one before it says. A
rank that waits for such a message which its sender has not got to yet is rehearsed again later.
Of messages without values it is noted when they leave, and when they are waited for.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from drivetrain.contracts import DONE, CommunicatorWrapper, Kind
from drivetrain.errors import DrivetrainError

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import Collective, Communicator, Handle
    from drivetrain.job.job import Job

Result = TypeVar("Result")


class Passed(NamedTuple):
    """A message of a rank, where it leaves or is waited for.

    Args:
        moment: operators that have run before.
        peer: the other rank.
        number: of the message, among those in its direction between the two.
        nbytes: of its values.
        leaves: whether this rank sends it.
    """

    moment: int
    peer: int
    number: int
    nbytes: int
    leaves: bool


class NotSentYetError(DrivetrainError):
    """A rehearsed rank waits for a message that its sender has not got to yet."""


class Post:
    """Has what rehearsed ranks have told each other.

    Attributes:
        ranks: those that take part, in the order in which they were found.
        passed: rank -> messages without values, in the order in which it sends and waits.
    """

    def __init__(self) -> None:
        self.ranks = [0]
        self.passed: dict[int, list[Passed]] = {}
        self._numbers: Counter[tuple[int, int, bool]] = Counter()
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

    def number(self, rank: int, peer: int, *, leaves: bool) -> int:
        """The number of the next message without values between two ranks; see :class:`Passed`."""
        self._know(peer)
        key = rank, peer, leaves
        self._numbers[key] += 1
        return self._numbers[key] - 1

    def note(self, rank: int, passed: Passed) -> None:
        """A message without values leaves a rank, or it waits for one."""
        self.passed[rank].append(passed)

    def _know(self, rank: int) -> None:
        if rank not in self.ranks:
            self.ranks.append(rank)

    def _begin(self, rank: int) -> None:
        self.passed[rank] = []
        for numbered in [numbered for numbered in self._numbers if numbered[0] == rank]:
            del self._numbers[numbered]
        for key in [key for key in self._sent if key[0] == rank]:
            self._sent[key] = []
        for key in [key for key in self._taken if key[1] == rank]:
            self._taken[key] = 0


@dataclass
class _Waited:
    """Notes when messages are waited for, once.

    Args:
        inner: of the message.
        note: notes it.
    """

    inner: Handle
    note: Callable[[], None]
    waited: bool = False

    def wait(self) -> None:
        if not self.waited:
            self.waited = True
            self.note()
        self.inner.wait()


class RehearsedMessages(CommunicatorWrapper):
    """Carries messages on the host between rehearsed ranks, and notes the others.

    Args:
        inner: the collectives, of ranks that do not exist.
        job: whose.
        post: has the messages.
        moment: how many operators have run.
    """

    def __init__(
        self, inner: Communicator, job: Job, post: Post, moment: Callable[[], int]
    ) -> None:
        super().__init__(inner)
        self._job, self._post, self._moment = job, post, moment

    def run(self, collective: Collective) -> Handle:
        tensors = collective.tensors
        if collective.kind is not Kind.SEND_RECEIVE:
            return super().run(collective)
        if any(not t.is_cpu for t in tensors):
            return self._note(collective)
        places, own = self._job.mesh.ranks(collective.axis), self._job.rank
        for index, (tensor, peer) in enumerate(zip(tensors, collective.peers, strict=True)):
            if index < collective.sends:
                self._post.send(tensor, own, places[peer])
            else:
                self._post.receive(tensor, places[peer], own)
        return DONE

    def _note(self, collective: Collective) -> Handle:
        """Note messages without values: those that leave now, others where they are waited for."""
        places, own = self._job.mesh.ranks(collective.axis), self._job.rank
        coming = []
        for index, (tensor, peer) in enumerate(
            zip(collective.tensors, collective.peers, strict=True)
        ):
            other, leaves = places[peer], index < collective.sends
            number = self._post.number(own, other, leaves=leaves)
            passed = Passed(self._moment(), other, number, tensor.nbytes, leaves)
            if leaves:
                self._post.note(own, passed)
            else:
                coming.append(passed)

        def waited() -> None:
            for each in coming:
                self._post.note(own, each._replace(moment=self._moment()))

        handle = _Waited(super().run(collective), waited)
        if not collective.asynchronous:
            handle.wait()
        return handle
