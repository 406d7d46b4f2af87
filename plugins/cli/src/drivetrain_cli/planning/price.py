"""How long a step takes, by the table of a machine."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from drivetrain_cli.planning.machine_table import seconds_at
from drivetrain_cli.planning.rehearsed import LAST, REPEATED

if TYPE_CHECKING:
    from drivetrain_cli.planning.machine_table import Curve, MachineTable
    from drivetrain_cli.planning.operators import Operator
    from drivetrain_cli.planning.rehearsed import Rehearsed, Sent

MESSAGES = "send_receive"
"""Name of the kind by which stages talk."""

_COSTLY = (
    "gelu",
    "exp",
    "tanh",
    "softmax",
    "silu",
    "sigmoid",
    "log",
    "norm",
    "pow",
    "erf",
    "rsqrt",
)
"""Names of what computes more by element than memory takes to bring it."""


@dataclass
class Price:
    """Seconds of one step, by what takes them.

    Args:
        phases: ``forward``, ``backward`` and ``step`` -> seconds of computing.
        overhead: of Python, over all phases.
        communication: (axis, purpose) -> seconds of collectives.
        exposed: seconds of collectives that nothing hides.
        bubble: of a pipeline; see :func:`~drivetrain_cli.planning.stages.wait_for_others`.
        flops: operations of products in one step, of this rank.
        exact: share of the computing whose operators were run one by one.
        notes: what the table lacks.
    """

    phases: dict[str, float]
    overhead: float
    communication: dict[tuple[str, str], float]
    exposed: float
    bubble: float
    flops: int
    exact: float
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.phases.values()) + self.overhead + self.exposed + self.bubble


def price_of(found: Rehearsed, table: MachineTable, *, on_cpu: bool) -> Price:
    """What a step of a rehearsed rank costs, as if it waited for no other stage.

    Args:
        found: what it does.
        table: of the machine.
        on_cpu: whether collectives and computing share cores, so that none hides the other.
    """
    notes: list[str] = []
    phases: dict[str, float] = defaultdict(float)
    exact = calls = 0.0
    for operator in found.operators.found.values():
        known = table.operators.get(operator.signature)
        each = seconds_of(operator, table)
        for (part, phase), count in operator.calls.items():
            often = count * times(part, found.accumulation, found.stages)
            phases[phase] += often * each
            exact += often * each if known is not None else 0.0
            calls += often
    for (part, _), count in found.operators.views.items():
        calls += count * times(part, found.accumulation, found.stages)
    phases.pop("build", None)
    communication: dict[tuple[str, str], float] = defaultdict(float)
    for sent in found.sent:
        communication[sent.axis, sent.purpose] += _collective(sent, table, notes)
    overhead = calls * table.overhead
    total = sum(communication.values())
    hidden = 0.0 if on_cpu else min(total, 0.8 * phases["backward"])
    computing = sum(phases.values())
    return Price(
        dict(phases),
        overhead,
        dict(communication),
        total - hidden,
        0.0,
        flops_of(found),
        exact / computing if computing else 0.0,
        notes,
    )


def flops_of(found: Rehearsed) -> int:
    """Operations of products that a rehearsed rank does in one step."""
    return sum(
        operator.flops * count * times(part, found.accumulation, found.stages)
        for operator in found.operators.found.values()
        for (part, _), count in operator.calls.items()
    )


def times(part: int, accumulation: int, stages: int) -> int:
    """How often a part of the rehearsal runs in one step."""
    if part == LAST:
        return 1
    return accumulation - 1 if part == REPEATED and stages == 1 else 0


def seconds_of(operator: Operator, table: MachineTable) -> float:
    """Seconds of one call, as it was run by itself, or else by the machine's curves."""
    known = table.operators.get(operator.signature)
    return _by_curves(operator, table) if known is None else known


def _by_curves(operator: Operator, table: MachineTable) -> float:
    """By curves: the longer one of what it computes and what it moves."""
    costly = any(word in operator.name for word in _COSTLY)
    curve = table.compute if costly else table.memory
    moving = seconds_at(curve, operator.moved) if operator.moved else 0.0
    if not operator.flops:
        return moving
    name = str(operator.dtype).removeprefix("torch.")
    products: Curve = table.matmul.get(name) or table.matmul.get("float32", [])
    return max(moving, seconds_at(products, operator.flops))


def _collective(sent: Sent, table: MachineTable, notes: list[str]) -> float:
    """Seconds of what is counted together; of other ranks than measured, by the ring's bytes.

    Messages between stages are no collectives: they take time where somebody waits for them.
    """
    if sent.op == MESSAGES:
        return 0.0
    if sent.ranks < 2 or not sent.calls:
        return 0.0
    by_ranks = table.collectives.get(sent.op) or table.collectives.get("all_reduce") or {}
    if not by_ranks:
        note = "the table has no collectives, so their time is not counted: drivetrain measure"
        if note not in notes:
            notes.append(note)
        return 0.0
    measured = min(by_ranks, key=lambda ranks: abs(int(ranks) - sent.ranks))
    each = seconds_at(by_ranks[measured], sent.payload / sent.calls)
    if int(measured) != sent.ranks:
        note = f"collectives of {sent.ranks} ranks are taken from those of {measured}"
        if note not in notes:
            notes.append(note)
        each *= ((sent.ranks - 1) / sent.ranks) / ((int(measured) - 1) / int(measured))
    return sent.calls * each
