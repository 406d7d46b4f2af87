"""Read the receipts of BENCHMARKS.md files: how a figure was measured, so that it can be again.

A receipt is a fenced block with the language ``receipt`` below the figures that it vouches for. It
is TOML with exactly the fields of :class:`Receipt`. Commands are run in the root of the repository,
with everything installed that ``make setup`` installs.

A section with a table of figures that has no receipt says by which command and on which day they
were measured, or has a comment ``<!-- no receipt: WHY -->``.
"""

from __future__ import annotations

import datetime as dt
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from drivetrain.errors import DrivetrainError

BLOCK = re.compile(r"^```receipt[ ]*\n(?P<text>.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```receipt", re.MULTILINE)
IDENTIFIER = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
SECTION = re.compile(r"^## ", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
TABLE_OF_FIGURES = re.compile(r"^\|.*\d", re.MULTILINE)
COMMAND = re.compile(r"(?:python )?(benchmarks/\w+\.py)")
DAY = re.compile(r"20\d\d-\d\d-\d\d")
EXCUSE = re.compile(r"^<!-- no receipt: \S.*-->$", re.MULTILINE)
PLACEHOLDER = re.compile(r"[A-Z]{2,}")


class ReceiptError(DrivetrainError):
    """A receipt is malformed; says in which file, in which line and how."""


@dataclass(frozen=True)
class Receipt:
    """How figures were measured, and how far another measurement may be off.

    Args:
        id: unique in the repository: words in lower case with hyphens, the package first.
        command: what measures it: ``python``, a file of the repository, and its arguments.
        figures: where the command prints a number -> the number. The place is what one has to look
            for, from the outside in, joined by ``" > "``: keys of printed JSON, or the title (where
            there are several tables), row and column of a printed table.
        better: ``"lower"`` or ``"higher"``: a figure that is better than stated holds as well.
        tolerance: by what part of the stated figure one may be worse and still hold, on the same
            hardware; more than 0 and less than 1.
        hardware: machine, what else ran on it, and versions that matter.
        date: day of the measurement.
    """

    id: str
    command: str
    figures: Mapping[str, float]
    better: str
    tolerance: float
    hardware: str
    date: dt.date


def files(root: Path) -> list[Path]:
    """Every BENCHMARKS.md of a checkout: beside the commands that measure, and of each package."""
    places = ("benchmarks", "core", "kernels", "plugins/*", "plugins/*/*")
    return sorted(file for place in places for file in root.glob(f"{place}/BENCHMARKS.md"))


def load(root: Path) -> dict[str, Receipt]:
    """All receipts of the workspace by id.

    Raises:
        ReceiptError: one is malformed, or two have one id.
    """
    found: dict[str, Receipt] = {}
    for file in files(root):
        for receipt in read(file, root):
            if receipt.id in found:
                name = file.relative_to(root)
                raise ReceiptError(f"{name}: another receipt has the id {receipt.id!r}, too")
            found[receipt.id] = receipt
    return found


def read(file: Path, root: Path) -> list[Receipt]:
    """The receipts in one file, in order.

    Raises:
        ReceiptError: one is malformed.
    """
    text = file.read_text("utf-8")
    blocks = {block.start(): block["text"] for block in BLOCK.finditer(text)}
    receipts = []
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + 1
        try:
            if fence.start() not in blocks:
                raise ReceiptError("the block of a receipt has to begin with ```receipt and to end")
            receipts.append(_parse(blocks[fence.start()], root))
        except (ReceiptError, tomllib.TOMLDecodeError) as error:
            raise ReceiptError(f"{file.relative_to(root)}:{line}: {error}") from error
    return receipts


def without_receipt(file: Path, root: Path) -> list[str]:
    """Sections of a file with figures that nothing vouches for: their places and what they lack.

    Args:
        file: a BENCHMARKS.md.
        root: of the checkout.
    """
    text = file.read_text("utf-8")
    starts = [found.start() for found in SECTION.finditer(text)] or [len(text)]
    found = []
    for start, stop in zip([0, *starts], [*starts, len(text)], strict=True):
        section = text[start:stop]
        if not TABLE_OF_FIGURES.search(FENCED.sub("", section)):
            continue
        if not FENCE.search(section) and not EXCUSE.search(section):
            commands = [root / name for name in COMMAND.findall(section)]
            day = DAY.search(section) or DAY.search(text[: starts[0]])  # said for the whole file
            if not any(map(Path.is_file, commands)) or not day:
                line = text.count("\n", 0, start) + 1
                found.append(
                    f"{file.relative_to(root)}:{line}: figures without a receipt, or a command "
                    "that measures them and the day on which it did"
                )
    return found


def _parse(text: str, root: Path) -> Receipt:
    content = tomllib.loads(text)
    names = [field.name for field in fields(Receipt)]
    if missing := [name for name in names if name not in content]:
        raise ReceiptError(f"a receipt needs {', '.join(missing)}")
    if unknown := sorted(content.keys() - set(names)):
        raise ReceiptError(f"a receipt has no {', '.join(unknown)}; it has {', '.join(names)}")
    for name, (right, expected) in _RULES.items():
        if not right(content[name]):
            raise ReceiptError(f"{name} has to be {expected}, not {content[name]!r}")
    _check_command(content["command"], root)
    return Receipt(**content)


def _check_command(command: str, root: Path) -> None:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ReceiptError(f"command cannot be split into words: {error}") from error
    if words[:1] != ["python"] or len(words) < 2 or not (root / words[1]).is_file():
        raise ReceiptError("command has to be python and a file of the repository that exists")
    if unclear := [word for word in words if PLACEHOLDER.search(word)]:
        raise ReceiptError(f"command has to run as it stands, {unclear[0]!r} is a placeholder")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_figures(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_is_number, value.values()))


_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "id": (
        lambda value: isinstance(value, str) and IDENTIFIER.fullmatch(value) is not None,
        "words in lower case with hyphens",
    ),
    "command": (lambda value: isinstance(value, str), "a text"),
    "figures": (_are_figures, "a table of numbers"),
    "better": (lambda value: value in ("lower", "higher"), "'lower' or 'higher'"),
    "tolerance": (lambda value: _is_number(value) and 0 < value < 1, "between 0 and 1"),
    "hardware": (lambda value: isinstance(value, str) and bool(value.strip()), "a text"),
    "date": (lambda value: type(value) is dt.date, "a date such as 2026-11-21"),
}
