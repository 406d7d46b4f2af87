"""Compare the minutes that tests took with the minutes that their environment may take.

No test is timed. The minutes are those that pytest wrote into its JUnit report: the wall time of
the whole session in one environment, from a run of ``tools/run_suite.py``.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

SLACK = 1.25
"""An environment fails when it takes more than this many times its budget: two runs on one idle
machine differ by a tenth, and environments that run two at a time disturb each other."""

BUSY = 0.2
"""Above this share of the processors' time in other hands, an exceeded budget is only a warning."""


@dataclass(frozen=True)
class Spent:
    """What the tests of one environment took, and what they may take.

    Args:
        environment: name of the tox environment.
        minutes: wall time of its pytest session.
        budget: declared minutes.
    """

    environment: str
    minutes: float
    budget: float

    @property
    def exceeded(self) -> bool:
        """True if it took more than its budget and the slack."""
        return self.minutes > self.budget * SLACK


class OtherWork:
    """Measure which share of the processors' time goes to processes that this one did not start.

    The share decides between failure and warning, since tests on a machine with other work take
    longer by no fault of theirs. Load averages could not tell: the tests themselves raise them.
    Time that a hypervisor steals counts as other work. Without ``/proc/stat`` the share is 0.
    """

    def __init__(self) -> None:
        self._before = self._read()

    def share(self) -> float:
        """Share, 0 to 1, since this object was made; our children count once they have ended."""
        ours, busy, total = (
            now - before for now, before in zip(self._read(), self._before, strict=True)
        )
        return min(1.0, max(0.0, (busy - ours) / total)) if total > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Processor seconds: of our ended children, of all processes, and with idle ones."""
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        ours = children.ru_utime + children.ru_stime + time.process_time()
        stat = Path("/proc/stat")
        if not stat.is_file():
            return ours, 0.0, 0.0
        # user, nice, system, idle, iowait, irq, softirq, steal, in hundredths of a second
        ticks = [
            int(field) / 100 for field in stat.read_text("ascii").split("\n", 1)[0].split()[1:9]
        ]
        return ours, sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def minutes_in(report: Path) -> float:
    """Wall time of the session in a JUnit XML file, in minutes."""
    suites = ET.parse(report).getroot().iter("testsuite")
    return sum(float(suite.get("time", "0")) for suite in suites) / 60


def spent(reports: Mapping[str, Path], budgets: Mapping[str, float]) -> list[Spent]:
    """Compare each environment that has a report with its budget, the slowest first."""
    found = [Spent(name, minutes_in(path), budgets[name]) for name, path in reports.items()]
    return sorted(found, key=lambda one: -one.minutes)


def table(found: Sequence[Spent]) -> str:
    """Show minutes and budget, an environment a line; one beyond its budget is marked."""
    rows = [f"{'environment':24}{'minutes':>8}{'budget':>8}"]
    for one in found:
        mark = "  *" if one.minutes > one.budget else ""
        rows.append(f"{one.environment:24}{one.minutes:8.1f}{one.budget:8.1f}{mark}")
    return "\n".join(rows)


def verdict(found: Sequence[Spent], other_work: float) -> tuple[bool, str]:
    """Decide whether the run fails, and say why.

    Args:
        found: minutes and budgets of all environments.
        other_work: share of the processors' time that other processes had.

    Returns:
        True and a message if an environment exceeded its budget and the machine was ours; False and
        a warning if it was busy with other work; False and an empty text if all kept their budgets.
    """
    late = [one for one in found if one.exceeded]
    if not late:
        return False, ""
    names = ", ".join(f"{one.environment} ({one.minutes:.1f} of {one.budget:g})" for one in late)
    text = f"more minutes than budget and slack ({SLACK:g} times) allow: {names}"
    if other_work > BUSY:
        return False, f"warning: {text}; other work had {other_work:.0%} of the processors"
    return True, f"{text}; make the tests faster, mark some as long, or raise `minutes`"
