"""Figures in BENCHMARKS.md files can be measured again: their receipts are complete."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from tools import receipts, workspace
from tools.receipts import ReceiptError

GOOD = """id = "zero-step"
command = "python benchmarks/step.py ddp drivetrain:1 --pairs 20"
figures = { "systems > drivetrain:1" = 0.86, "rows" = 3 }
better = "lower"
tolerance = 0.04
hardware = "2 cores, idle; torch 2.13"
date = 2026-11-21
"""


def repository(root: Path, *texts: str) -> Path:
    files = {
        "benchmarks/step.py": "",
        "core/pyproject.toml": '[project]\nname = "drivetrain"\n',
        "core/BENCHMARKS.md": "# Core\n\n| a | 1 |\n\n"
        + "\n".join(f"```receipt\n{text}```\n" for text in texts),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


def test_every_file_of_figures_has_receipts_and_all_are_well_formed() -> None:
    files = receipts.files(workspace.ROOT)
    assert len(files) >= 4
    folders = [distribution.folder for distribution in workspace.load().values()]
    own = {folder / "BENCHMARKS.md" for folder in [workspace.ROOT / "benchmarks", *folders]}
    assert set(files) == {file for file in own if file.is_file()}
    assert [file for file in files if not receipts.read(file, workspace.ROOT)] == []
    receipts.check()


@pytest.mark.parametrize(
    ("section", "misses"),
    [
        ("Read it: `python benchmarks/step.py`, 2026-11-21.\n\n| a | 1 |\n", False),
        ("Read it: `python benchmarks/step.py`.\n\n| a | 1 |\n", True),
        ("Read it: `python benchmarks/gone.py`, 2026-11-21.\n\n| a | 1 |\n", True),
        ("<!-- no receipt: another system's tests -->\n\n| a | 1 |\n", False),
        ("<!-- no receipt: -->\n\n| a | 1 |\n", True),
        ("No table, 1.\n", False),
        (f"| a | 1 |\n\n```receipt\n{GOOD}```\n", False),
    ],
)
def test_figures_without_receipt_or_command_are_told(tmp_path, section, misses) -> None:
    root = repository(tmp_path)
    file = root / "core/BENCHMARKS.md"
    file.write_text(f"# Core\n\nText.\n\n## Steps\n\n{section}")
    assert bool(receipts.without_receipt(file, root)) is misses
    assert all(
        text.startswith("core/BENCHMARKS.md:5:") for text in receipts.without_receipt(file, root)
    )


def test_a_receipt_is_read_as_it_was_written(tmp_path: Path) -> None:
    (receipt,) = receipts.load(repository(tmp_path, GOOD)).values()
    assert receipt == receipts.Receipt(
        id="zero-step",
        command="python benchmarks/step.py ddp drivetrain:1 --pairs 20",
        figures={"systems > drivetrain:1": 0.86, "rows": 3},
        better="lower",
        tolerance=0.04,
        hardware="2 cores, idle; torch 2.13",
        date=dt.date(2026, 11, 21),
    )


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('id = "zero-step"\n', "", "a receipt needs id"),
        ('better = "lower"', 'better = "lower"\nnote = "x"', "a receipt has no note; it has id, "),
        ('"zero-step"', '"Zero step"', "id has to be words in lower case with hyphens"),
        ("python bench", "fast bench", "command has to be python and a file"),
        ("step.py", "gone.py", "command has to be python and a file"),
        ("--pairs 20", "--path FOLDER", "'FOLDER' is a placeholder"),
        ("--pairs 20", "--pairs '20", "command cannot be split into words"),
        ("3 }", '"3" }', "figures has to be a table of numbers"),
        ('"lower"', '"smaller"', "better has to be 'lower' or 'higher'"),
        ("0.04", "4", "tolerance has to be between 0 and 1"),
        ("0.04", "true", "tolerance has to be between 0 and 1"),
        ('"2 cores, idle; torch 2.13"', '" "', "hardware has to be a text"),
        ("2026-11-21", '"yesterday"', "date has to be a date"),
        ("2026-11-21", "2026-11-21T10:00:00", "date has to be a date"),
        ("tolerance = 0.04", "tolerance", "Expected '='"),
        ("2026-11-21\n", "2026-11-21\n ", "has to begin with ```receipt and to end"),
    ],
)
def test_a_malformed_receipt_is_refused_with_its_place(tmp_path, old, new, complaint) -> None:
    assert old in GOOD
    root = repository(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ReceiptError) as caught:
        receipts.load(root)
    assert str(caught.value).startswith("core/BENCHMARKS.md:5: ")
    assert complaint in str(caught.value)


def test_two_receipts_with_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReceiptError, match=r"^core/BENCHMARKS.md: .* has the id 'zero-step'"):
        receipts.load(repository(tmp_path, GOOD, GOOD))
