"""Run every tox environment of the workspace and print one summary of all their tests.

Cheap environments run two at a time; those that use both cores themselves run alone afterwards. A
failing environment does not keep the others from running. Then it compares the minutes that each
took with its budget (``tools/budgets.py``). Long environments are never run here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import budgets, workspace

ALONE = ("core", "checkpoints", "frameworks", "examples", "integration")
"""Environments whose tests start several processes each and take minutes."""


@dataclass
class Tally:
    """Outcomes of tests, added up over environments."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    errors: int = 0

    def add(self, report: Path) -> None:
        """Add the outcomes in a JUnit XML file."""
        for suite in ET.parse(report).getroot().iter("testsuite"):
            total, failed, errors, skipped = (
                int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")
            )
            self.passed += total - failed - errors - skipped
            self.failed += failed
            self.errors += errors
            self.skipped += skipped

    def __str__(self) -> str:
        words = {"failed": self.failed, "passed": self.passed, "skipped": self.skipped}
        words["errors"] = self.errors
        return ", ".join(f"{n} {word}" for word, n in words.items() if n or word == "passed")


def main() -> int:
    """Run the suite; answers 0 when every environment passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-p", "--parallel", type=int, default=2, help="cheap environments at once")
    parallel = parser.parse_args().parallel
    started, other_work = time.time(), budgets.OtherWork()
    cheap, alone = environments()
    work = workspace.ROOT / ".tox"
    for name in (*cheap, *alone):
        (work / name / "report.xml").unlink(missing_ok=True)
    codes = [
        _tox("run-parallel", "-p", str(parallel), "--parallel-no-spinner", "-e", ",".join(cheap)),
        _tox("run", "-e", ",".join(alone)),
    ]
    late = _budgets(work, [*cheap, *alone], other_work.share())
    return _summary(work, [*cheap, *alone], [*codes, int(late)], time.time() - started)


def environments() -> tuple[list[str], list[str]]:
    """Environments of the suite: those that may run two at a time, and those that run alone."""
    names = [d.environment for d in workspace.load().values()]
    cheap = ["lint", *(name for name in names if name not in ALONE)]
    return cheap, list(ALONE)


def _tox(*arguments: str) -> int:
    command = [sys.executable, "-m", "tox", *arguments]
    return subprocess.run(command, cwd=workspace.ROOT, check=False).returncode


def _budgets(work: Path, names: list[str], other_work: float) -> bool:
    """Print minutes and budgets; returns True if the run fails for them."""
    reports = {name: work / name / "report.xml" for name in names}
    there = {name: report for name, report in reports.items() if report.is_file()}
    found = budgets.spent(there, workspace.budgets())
    failed, message = budgets.verdict(found, other_work)
    print(budgets.table(found), message, sep="\n")
    return failed


def _summary(work: Path, names: list[str], codes: list[int], seconds: float) -> int:
    tally, missing = Tally(), []
    for name in names:
        report = work / name / "report.xml"
        if report.is_file():
            tally.add(report)
        elif name != "lint":
            missing.append(name)
    if missing:
        print(f"no test report from: {', '.join(missing)}")
    failed = any(codes) or bool(missing) or tally.failed > 0 or tally.errors > 0
    line = f" {tally} in {seconds:.0f}s ({len(names)} environments{', FAILED' if failed else ''}) "
    print(line.center(100, "="))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
