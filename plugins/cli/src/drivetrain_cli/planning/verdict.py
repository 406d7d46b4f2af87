"""The answer of ``drivetrain plan``: rehearsed ranks, their prices, and what fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from drivetrain_cli.planning.fitting import (
    Change,
    largest_micro_batch,
    needed,
    ways_out,
)
from drivetrain_cli.planning.price import Price, price_of
from drivetrain_cli.planning.rehearsed import Rehearsed, rehearse
from drivetrain_cli.planning.stages import wait_for_others
from drivetrain_cli.rehearsed_messages import Post

if TYPE_CHECKING:
    from drivetrain_cli.memory import Ranks
    from drivetrain_cli.planning.machine_table import MachineTable
    from drivetrain_cli.planning.subject import Subject


@dataclass(frozen=True)
class Question:
    """What is asked.

    Args:
        config: merged.
        subject: model and inputs.
        ranks: how many on a machine, and whether on a CPU.
        world: number of ranks.
        memory: bytes of a device; ``None`` if unknown.
        table: of the machine; ``None`` if there is none.
        largest: whether the largest micro-batch is wanted.
        ways_out: whether to look for what fits where the job does not.
    """

    config: Mapping[str, Any]
    subject: Subject
    ranks: Ranks
    world: int
    memory: int | None
    table: MachineTable | None
    largest: bool
    ways_out: bool = True


@dataclass
class Verdict:
    """What is answered.

    Args:
        question: to what.
        ranks: those that may need most.
        price: of the slowest of them; ``None`` without a table.
        needs: bytes of a device, with the allocator's slack; see :attr:`Rehearsed.needs`.
        fits: whether there are as many; true where that is not known.
        largest: largest micro-batch that fits and bytes that it needs; ``None`` if not asked for.
        ways_out: what makes it fit, where it does not.
        tried: what does not, one sentence each.
        notes: what was assumed.
    """

    question: Question
    ranks: Sequence[Rehearsed]
    price: Price | None
    needs: int
    fits: bool
    largest: tuple[int, int] | None = None
    ways_out: Sequence[Change] = ()
    tried: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def heaviest(self) -> Rehearsed:
        """The rank whose device has to have most."""
        return max(self.ranks, key=lambda rank: rank.needs)


def answer(
    question: Question, add_times: Callable[[MachineTable, Rehearsed], None] | None = None
) -> Verdict:
    """Rehearse, price, and find what fits.

    Args:
        question: what is asked.
        add_times: runs a rehearsal's operators and adds their times to the table.

    Raises:
        ConfigError: the config is not one that a job would run, or the model cannot be made.
        DrivetrainError: the job does not run without memory.
    """
    on_cpu, memory = question.ranks.on_cpu, question.memory
    run = partial(_all_stages, question)
    found = run(())
    price = None
    notes = list(found[0].notes)
    if question.table is not None:
        if add_times is not None:
            for each in found:
                add_times(question.table, each)
        prices = [price_of(each, question.table, on_cpu=on_cpu) for each in found]
        wait_for_others(found, prices, question.table)
        price = max(prices, key=lambda each: each.seconds)
        notes += price.notes
    else:
        notes.append("there is no table of the machine, so no times: run drivetrain measure")
    needs = needed(found)
    verdict = Verdict(question, found, price, needs, memory is None or needs <= memory)
    verdict.notes = notes
    if memory is None:
        return verdict
    micro = found[0].micro_batch
    if question.largest:
        verdict.largest = largest_micro_batch(run, micro, memory, now=needs)
    if not verdict.fits and question.ways_out:
        verdict.ways_out, verdict.tried = ways_out(
            question.config, run, memory, micro=micro, on_cpu=on_cpu
        )
    return verdict


def _all_stages(question: Question, overlays: Sequence[str]) -> Sequence[Rehearsed]:
    """Rank 0, and those of other stages of its pipeline; all ranks beside them do the same."""
    post = Post()
    return post.rehearse(
        lambda rank: rehearse(
            question.config,
            question.subject,
            question.ranks,
            world=question.world,
            overlays=overlays,
            rank=rank,
            post=post,
        )
    )
