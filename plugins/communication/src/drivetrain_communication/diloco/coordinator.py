"""Who takes part in an exchange: what the meeting point decides, without any sockets.

A replica *comes* once and then asks for *rounds*. What happens between two decisions:

1. Replicas that are in step all ask for the same round. When all that live have, the coordinator
   sends each a :class:`Record` that names who takes part. Replicas that came meanwhile take part,
   too: they only receive.
2. Those named exchange values and say whether that succeeded. When all that live have, the
   coordinator decides for all: either every one of them has the values, or they try again without
   those that have ended.

The first round is that of the founders, who begin with the weights of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

FOUNDING = -1
"""The fragment of the round in which replicas begin: none."""

_MOST_TRIES = 3
"""Exchanges that fail among the same replicas, all of which live, before the run is given up."""

Send = Callable[[Mapping[str, Any]], None]


@dataclass
class _Member:
    """A replica that is connected.

    Args:
        send: writes a message to it.
        facts: what must be the same in all replicas.
        step: inner steps that it has done, when it last said so.
        in_step: whether it has the run's values.
        asked: the fragment of the round that it waits for, ``None`` while it trains.
        succeeded: how the exchange that it takes part in ended for it.
    """

    send: Send
    facts: Mapping[str, Any]
    step: int
    in_step: bool = False
    asked: int | None = None
    succeeded: bool | None = None


@dataclass
class _Round:
    """An exchange that is under way, by the replicas that began it."""

    members: frozenset[int]
    lost: set[int] = field(default_factory=set)


class Coordinator:
    """Decides, one message at a time; see the module.

    Args:
        say: told what is worth knowing, a line each.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._members: dict[int, _Member] = {}
        self._round: _Round | None = None
        self._generation = 0
        self._tries = 0

    def come(self, replica: int, step: int, facts: Mapping[str, Any], send: Send) -> bool:
        """A replica wants to take part; answers whether it may."""
        if replica in self._members:
            send(_refusal(f"replica {replica} is there already; give each job its own number"))
            return False
        for other, member in self._members.items():
            differing = [key for key in facts if facts[key] != member.facts.get(key)]
            if differing:
                key = differing[0]
                send(
                    _refusal(
                        f"replica {replica} has {key} = {facts[key]}, replica {other} has "
                        f"{member.facts.get(key)}; all replicas of a run must agree"
                    )
                )
                return False
        self._members[replica] = _Member(send, facts, step, asked=FOUNDING)
        self._say(f"replica {replica} came after {step} steps; present: {_listed(self._members)}")
        self._advance()
        return True

    def has(self, replica: int) -> bool:
        """Whether a replica takes part."""
        return replica in self._members

    def ask(self, replica: int, step: int, fragment: int) -> None:
        """A replica has done ``step`` steps and waits for the round of ``fragment``."""
        member = self._members[replica]
        member.step, member.asked = step, fragment
        self._advance()

    def answer(self, replica: int, succeeded: bool) -> None:
        """The exchange that a replica took part in has ended for it."""
        self._members[replica].succeeded = succeeded
        self._advance()

    def gone(self, replica: int, why: str) -> None:
        """A replica has left, or its connection broke."""
        del self._members[replica]
        if self._round is not None and replica in self._round.members:
            self._round.lost.add(replica)
        self._say(f"replica {replica} {why}; present: {_listed(self._members)}")
        self._advance()

    def is_waiting(self, replica: int) -> bool:
        """Whether a replica waits for a round or for a decision."""
        member = self._members.get(replica)
        return member is not None and member.asked is not None

    def waiting_for(self) -> str:
        """Whom the next decision waits for, in words."""
        if self._round is not None:
            return _listed(r for r in self._present() if self._members[r].succeeded is None)
        in_step = [r for r, m in self._members.items() if m.in_step]
        if in_step:
            return _listed(r for r in in_step if self._members[r].asked is None)
        founders = self._founders()
        return _listed(r for r in range(founders) if r not in self._members)

    def _present(self) -> list[int]:
        assert self._round is not None
        return [r for r in sorted(self._round.members) if r in self._members]

    def _founders(self) -> int:
        return max((int(m.facts["replicas"]) for m in self._members.values()), default=0)

    def _advance(self) -> None:
        if self._round is not None:
            self._decide()
        if self._round is None:
            self._begin()

    def _decide(self) -> None:
        """End the exchange once all that live have answered."""
        assert self._round is not None
        present = self._present()
        answers = [self._members[r].succeeded for r in present]
        if None in answers:
            return
        commit, lost = all(answers), self._round.lost
        self._tries = 0 if commit or lost else self._tries + 1
        self._round = None
        for replica in present:
            member = self._members[replica]
            member.succeeded = None
            member.asked = None
            member.in_step = member.in_step or commit
            if self._tries >= _MOST_TRIES:
                member.send(
                    _refusal(
                        f"replicas {_listed(present)} reach the meeting point, but {self._tries} "
                        "exchanges between them failed; see their messages"
                    )
                )
            else:
                member.send({"do": "decision", "commit": commit})
        if not commit:
            self._say(f"an exchange failed; without {_listed(lost)}, again")

    def _begin(self) -> None:
        """Begin an exchange once all that it needs have asked for it."""
        in_step = [r for r in sorted(self._members) if self._members[r].in_step]
        if any(self._members[r].asked is None for r in in_step):
            return
        comers = [r for r, m in sorted(self._members.items()) if not m.in_step and _waits(m)]
        if not in_step and (not comers or len(comers) < self._founders()):
            return
        asked = {(self._members[r].step, self._members[r].asked) for r in in_step}
        if len(asked) > 1:
            self._refuse_all(in_step)
            return
        furthest = max(comers, key=lambda r: (self._members[r].step, -r), default=None)
        source = in_step[0] if in_step else furthest
        assert source is not None
        members = sorted([*in_step, *comers])
        self._generation += 1
        self._round = _Round(frozenset(members))
        record = {
            "do": "exchange",
            "generation": self._generation,
            "members": members,
            "givers": in_step,
            "adopting": comers,
            "source": source,
            "step": self._members[source].step,
            "fragment": self._members[source].asked if in_step else FOUNDING,
        }
        for replica in members:
            self._members[replica].send(record)

    def _refuse_all(self, in_step: list[int]) -> None:
        states = ", ".join(
            f"replica {r}: fragment {self._members[r].asked} after {self._members[r].step} steps"
            for r in in_step
        )
        for replica in in_step:
            self._members[replica].send(_refusal(f"replicas are not in step ({states})"))


def _waits(member: _Member) -> bool:
    return member.asked is not None


def _refusal(why: str) -> dict[str, Any]:
    return {"do": "refuse", "why": why}


def _listed(replicas: Any) -> str:
    return ", ".join(map(str, sorted(replicas))) or "none"
