"""Finding the one failure that explains a failed run, and saying it in a few lines."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivetrain.errors import DrivetrainError
from drivetrain_cli.rank import FIRST_LOG

TAIL_LINES = 12

FAILURE = "drivetrain_failure"
"""Key of the one line of JSON that ``--failure-format json`` ends with."""

HOST = "DRIVETRAIN_HOST"
"""Variable with the name that whoever has started this machine calls it by."""


@dataclass(frozen=True)
class Explained:
    """Why the ranks of this machine have failed.

    Args:
        text: for people; several lines.
        time_ns: when the first of them failed, by this machine's clock.
        follows: whether a failure on another machine has brought it about.
    """

    text: str
    time_ns: int
    follows: bool

    def error(self) -> DrivetrainError:
        """The exception that shows it."""
        return DrivetrainError(self.text)

    def json(self) -> str:
        """One line for a program that has started several machines."""
        content = {
            "host": os.environ.get(HOST, platform.node()),
            "time_ns": self.time_ns,
            "follows": self.follows,
            "text": self.text,
        }
        return json.dumps({FAILURE: content})


def explain_failure(folder: Path, ranks: int) -> Explained:
    """What happened, from the files that the agent and the ranks of this machine left.

    Args:
        folder: the run folder.
        ranks: how many ranks ran on this machine.
    """
    raised = sorted(map(_read, folder.glob("rank*.error.json")), key=lambda e: e["time_ns"])
    ended = _read(folder / "failures.json")
    agent = _read(folder / "agent.error.json")
    causes = [error for error in raised if not error.get("follows")]
    if causes:
        lines = _raised(causes, folder)
    elif killed := {r: f for r, f in ended.items() if _killed(f)}:
        lines = _ended(killed, folder)
    elif raised:
        lines = _raised(raised, folder)
    elif ended:
        lines = _ended(ended, folder)
    elif agent:
        lines = [f"the ranks could not be started: {agent['message']}"]
    else:
        lines = ["torchrun ended without saying why", *_tail(_first_log(folder))]
    follows = bool(raised) and not causes and not any(map(_killed, ended.values()))
    return Explained(
        text="\n".join([*lines, f"logs of all {ranks} ranks: {folder}"]),
        time_ns=(causes or raised)[0]["time_ns"] if raised else time.time_ns(),
        follows=follows,
    )


def _raised(errors: list[dict[str, Any]], folder: Path) -> list[str]:
    first = errors[0]
    same = [str(e["rank"]) for e in errors[1:] if e["message"] == first["message"]]
    also = f" (and in the same way rank {', '.join(same)})" if same else ""
    lines = [f"rank {first['rank']} failed{also}: {first['message']}"]
    if first["where"]:
        lines.append(f"  raised at {first['where']}")
    # the first rank's output has been on the screen already
    complete = first["local_rank"] == 0 or first.get("says_all", False)
    return lines if complete else [*lines, *_tail(_log(folder, first["rank"]))]


def _killed(failure: dict[str, Any]) -> bool:
    # A rank that torchrun itself ended, because another had failed, shows SIGTERM.
    return bool(failure["exit_code"] < 0 and failure["exit_code"] != -signal.SIGTERM)


def _ended(failures: dict[str, Any], folder: Path) -> list[str]:
    own = {r: f for r, f in failures.items() if f["exit_code"] != -signal.SIGTERM} or failures
    rank, failure = next(iter(own.items()))
    code = failure["exit_code"]
    how = f"exited with code {code}" if code >= 0 else f"was killed by {_signal_name(-code)}"
    hint = "; often this means that memory ran out" if -code == signal.SIGKILL else ""
    return [f"rank {rank} {how}{hint}", *_tail(_log(folder, rank))]


def _log(folder: Path, rank: int | str) -> Path:
    return folder / f"rank{rank}.log"


def _first_log(folder: Path) -> Path:
    """The log of this machine's first rank, which may have ended before it had a number."""
    numbered = sorted(folder.glob("rank*.log"), key=lambda log: int(log.stem[4:]))
    return numbered[0] if numbered else folder / FIRST_LOG


def _tail(log: Path) -> list[str]:
    text = log.read_text("utf-8", errors="replace") if log.is_file() else ""
    lines = text.rstrip().splitlines()[-TAIL_LINES:]
    return [f"  last lines of {log}:", *(f"  | {line}" for line in lines)] if lines else []


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return content
