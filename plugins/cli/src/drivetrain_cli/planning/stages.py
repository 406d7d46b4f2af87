"""How long the stages of a pipeline wait for each other: their rehearsals, played with a clock.

Nothing here knows of schedules. A rehearsed rank has told in which order it computes, sends and
waits; with the times of its operators that is all there is to know of when messages leave, when
they are there, and who waits for them how long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from drivetrain.errors import DrivetrainError
from drivetrain_cli.planning.machine_table import seconds_at
from drivetrain_cli.planning.operators import VIEW
from drivetrain_cli.planning.price import MESSAGES, seconds_of

if TYPE_CHECKING:
    from drivetrain_cli.planning.machine_table import MachineTable
    from drivetrain_cli.planning.price import Price
    from drivetrain_cli.planning.rehearsed import Rehearsed
    from drivetrain_cli.rehearsed_messages import Passed


def wait_for_others(
    found: Sequence[Rehearsed], prices: Sequence[Price], table: MachineTable
) -> None:
    """Write into the prices of a pipeline's stages how long each waits in a step.

    A step ends on all of them together, with the norm of gradients or with the next one's inputs.

    Args:
        found: one rank of each stage.
        prices: of them, without waiting.
        table: of the machine; without times of messages these cost nothing.

    Raises:
        DrivetrainError: they wait for messages that nobody sends.
    """
    if len(found) < 2:
        return
    between = table.collectives.get(MESSAGES) or {}
    curve = next(iter(between.values()), [])
    if not curve:
        for price in prices:
            price.notes.append("the table has no messages, so those between stages take no time")
    seconds = [_pieces(each, price, table) for each, price in zip(found, prices, strict=True)]
    places = {each.rank: place for place, each in enumerate(found)}
    clocks = [0.0] * len(found)
    there: dict[tuple[int, int, int], float] = {}
    rest = [iter(zip(found[at].passed, own, strict=False)) for at, own in enumerate(seconds)]
    waiting: list[tuple[Passed, float] | None] = [next(each, None) for each in rest]
    moved = True
    while moved:
        moved = False
        for place, rank in enumerate(found):
            while (head := waiting[place]) is not None:
                passed, before = head
                if passed.leaves:
                    clocks[place] += before
                    arrives = clocks[place] + seconds_at(curve, passed.nbytes)
                    there[rank.rank, passed.peer, passed.number] = arrives
                else:
                    arrives = there.get((passed.peer, rank.rank, passed.number), -1.0)
                    if arrives < 0:
                        break
                    clocks[place] = max(clocks[place] + before, arrives)
                waiting[place] = next(rest[place], None)
                moved = True
    for place, head in enumerate(waiting):
        if head is not None:
            raise DrivetrainError(
                f"rank {found[place].rank} waits for a message of rank {head[0].peer} that it does "
                f"not send; rehearsed were ranks {sorted(places)}"
            )
    ends = [clock + own[-1] for clock, own in zip(clocks, seconds, strict=True)]
    for price in prices:
        price.bubble = max(0.0, max(ends) - price.seconds)


def _pieces(found: Rehearsed, price: Price, table: MachineTable) -> list[float]:
    """Seconds of computing before each message, and of what follows the last one.

    What a rank does beside operators (collectives of other axes) is spread over them.
    """
    each = {
        operator.number: seconds_of(operator, table) for operator in found.operators.found.values()
    }
    each[VIEW] = 0.0
    begins = found.step_begins
    taken = (each[number] + table.overhead for number in found.operators.order[begins:])
    until = [0.0, *accumulate(taken)]
    stretched = price.seconds / until[-1] if until[-1] else 1.0
    marks = [*(passed.moment - begins for passed in found.passed), len(until) - 1]
    return [stretched * (until[at] - until[before]) for before, at in _steps(marks)]


def _steps(marks: Sequence[int]) -> Iterator[tuple[int, int]]:
    before = 0
    for mark in marks:
        yield before, mark
        before = mark
