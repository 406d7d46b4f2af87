"""DiLoCo around the steps of one engine (Douillard et al. 2023, arXiv:2311.08105, algorithm 1).

Replicas are jobs of their own, with all that a job has: axes, ZeRO, offload, checkpoints. Each
trains by itself. After H steps a replica's *outer gradient* is how far it has come from the
*anchor*, the weights that all replicas had; the mean of these over replicas is the gradient of an
outer optimizer, SGD with Nesterov momentum, whose weights are the anchor. All go on from there.

In the streaming form (arXiv:2501.18512, algorithm 2) fragments of the model do so in turn, training
goes on while they travel, and what arrives is mixed with what a replica has reached meanwhile.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch

from drivetrain.contracts import Fragment, Op, Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain_communication.diloco.calendar import Calendar
from drivetrain_communication.diloco.codecs import Codec, codec
from drivetrain_communication.diloco.coordinator import FOUNDING
from drivetrain_communication.diloco.holdings import Holdings
from drivetrain_communication.diloco.rounds import Outcome, Rounds

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain_communication.diloco.section import DilocoSection

logger = logging.getLogger("drivetrain.diloco")

PREFIX = "diloco/"

_TAG = Tag(Purpose.CONTROL, site="diloco")


@dataclass
class _Travel:
    """A fragment under way.

    Args:
        fragment: which.
        arrives: after how many steps it counts.
        future: of the round; ``None`` once the mean is there.
    """

    fragment: int
    arrives: int
    future: Future[Outcome] | None = None


class Diloco:
    """The outer training of one engine, on one rank.

    Args:
        engine: the inner training.
        section: how.

    Attributes:
        steps: inner steps since the run began, the same for all replicas.
        rounds: what was sent.
    """

    def __init__(self, engine: Engine, section: DilocoSection) -> None:
        self._engine, self._section = engine, section
        self._replica = section.which()
        self._calendar = Calendar(section.inner_steps, section.fragments, section.delay)
        self.rounds = Rounds(engine.job, self._replica, section.where(), section.patience_seconds)
        self.holdings = Holdings(engine, self._calendar)
        parts = range(section.fragments)
        self._anchors = [self.holdings.read(part) for part in parts]
        self._momenta = [torch.zeros_like(anchor) for anchor in self._anchors]
        self._means = [
            torch.zeros_like(a) if section.delay else a.new_empty(0) for a in self._anchors
        ]
        self._travel: _Travel | None = None
        self._in_step = False
        self.steps = 0

    # -- the training thread, on every rank alike -------------------------------------------------

    def come(self) -> None:
        """Take part, before the first step. Collective, and waits for the other replicas.

        Whoever differs from what the run has takes that over: weights, outer momentum and number
        of steps; its inner optimizer's states stay.
        """
        if self._in_step:
            return
        with self._engine.job.span("diloco wait"):
            outcome = self.rounds.result(
                self.rounds.begin(
                    self.steps, FOUNDING, self._facts(), self._nothing, self._values()
                )
            )
        self._in_step = True
        record = outcome.record
        if self._any(self._differs(outcome)):
            for own, value in zip(self._values(), outcome.handed or (), strict=True):
                own.copy_(value)
            self.steps, self._travel = int(record["step"]), None
            self.holdings.write(list(self._anchors))
            logger.info(
                "replica %d took over the weights of replica %d after %d steps",
                self._replica,
                record["source"],
                self.steps,
            )
        if record["fragment"] != FOUNDING:  # the others have just begun this
            self._travel = _Travel(record["fragment"], self.steps + self._section.delay)
            self._keep_mean(self._travel, outcome)
            self._arrive()

    def _differs(self, outcome: Outcome) -> bool:
        """Whether this rank has other values than the run."""
        if outcome.handed is None:
            return False
        pairs = zip(self._values(), outcome.handed, strict=True)
        return self.steps != outcome.record["step"] or not all(torch.equal(*p) for p in pairs)

    def stepped(self) -> None:
        """An inner step has been done. Collective; communicates with other replicas when due."""
        self.steps += 1
        self._arrive()
        fragment = self._calendar.due(self.steps)
        if fragment is None:
            return
        if not self.holdings.is_current():
            raise TrainingError(
                "diloco: parameters were frozen, unfrozen or cut anew since the run began, so "
                "replicas would average different things; save, and start all replicas anew"
            )
        outgoing = self._anchors[fragment] - self.holdings.read(fragment)
        future = self.rounds.begin(
            self.steps, fragment, {}, lambda _: (outgoing, self._codec()), self._values()
        )
        self._travel = _Travel(fragment, self.steps + self._section.delay, future)
        self._arrive()

    def finish(self) -> None:
        """Have what is under way arrive, so that it can be saved; it counts when it is due."""
        travel = self._travel
        if travel is None or travel.future is None:
            return
        with self._engine.job.span("diloco wait"):
            outcome = self.rounds.result(travel.future)
        self._keep_mean(travel, outcome)

    def close(self) -> None:
        """Leave the other replicas."""
        self.rounds.close()

    def _keep_mean(self, travel: _Travel, outcome: Outcome) -> None:
        assert outcome.mean is not None
        travel.future = None
        if self._section.delay:
            self._means[travel.fragment].copy_(outcome.mean)
        else:
            self._means[travel.fragment] = outcome.mean

    def _arrive(self) -> None:
        """Apply the outer gradient that is under way, if it is due."""
        travel = self._travel
        if travel is None or self.steps < travel.arrives:
            return
        self.finish()
        with self._engine.job.span("diloco"):
            anchor, momentum = self._anchors[travel.fragment], self._momenta[travel.fragment]
            rate, decay = self._section.outer_learning_rate, self._section.outer_momentum
            mean = self._means[travel.fragment]
            momentum.mul_(decay).add_(mean)
            anchor.sub_(mean.add(momentum, alpha=decay), alpha=rate)
            values = anchor
            if self._section.delay:
                values = torch.lerp(
                    anchor, self.holdings.read(travel.fragment), self._section.mixing
                )
            written: list[torch.Tensor | None] = [None] * len(self._anchors)
            written[travel.fragment] = values
            self.holdings.write(written)
        self._travel = None

    # -- what others need -------------------------------------------------------------------------

    def _values(self) -> list[torch.Tensor]:
        """What a newcomer needs."""
        return [*self._anchors, *self._momenta]

    def _codec(self) -> Codec:
        section = self._section
        return codec(section.outer_gradients, section.block, self.holdings.dtype)

    def _nothing(self, fragment: int) -> tuple[torch.Tensor, Codec]:
        """What a newcomer gives: numbers that do not count."""
        return torch.zeros_like(self._anchors[fragment]), self._codec()

    def _facts(self) -> dict[str, Any]:
        """What all replicas must agree on."""
        names = (
            *("replicas", "inner_steps", "outer_learning_rate", "outer_momentum", "fragments"),
            *("delay", "mixing", "outer_gradients", "block"),
        )
        job = self._engine.job
        layouts = torch.zeros(job.world_size, dtype=torch.int64, device=job.device)
        layouts[job.rank] = self.holdings.layout
        job.communicator.all_reduce(layouts, "world", _TAG)
        return {
            **{f"diloco.{name}": getattr(self._section, name) for name in names},
            "replicas": self._section.replicas,
            "number of ranks": job.world_size,
            "checksum of which rank has which part of which parameter": crc32(
                repr(layouts.tolist()).encode()
            ),
        }

    def _any(self, value: bool) -> bool:
        """Whether ``value`` holds on some rank of this replica."""
        job = self._engine.job
        flag = torch.tensor([int(value)], device=job.device)
        job.communicator.all_reduce(flag, "world", _TAG, op=Op.MAX)
        return bool(flag.item())

    # -- checkpoints ------------------------------------------------------------------------------

    def fragments(self) -> list[Fragment]:
        """Anchors, momenta, and what is under way, which is waited for."""
        self.finish()
        found: list[Fragment] = []
        kinds = {"anchor": self._anchors, "outer momentum": self._momenta}
        if self._section.delay:
            kinds["mean"] = self._means
        for kind, flats in kinds.items():
            for part, flat in enumerate(flats):
                found += self.holdings.as_fragments(part, flat, f"{PREFIX}{kind}/")
        return found

    def state(self) -> dict[str, Any]:
        """Plain data beside :meth:`fragments`."""
        travel = self._travel
        under_way = None if travel is None else [travel.fragment, travel.arrives]
        return {"steps": self.steps, "under way": under_way, "replica": self._replica}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned, once fragments have been read."""
        self.steps = int(state["steps"])
        under_way = state["under way"]
        self._travel = _Travel(*under_way) if under_way and self._section.delay else None
