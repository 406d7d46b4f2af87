"""Stated figures are measured again, and whoever asks is told which hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from drivetrain_cli.claims.command import reproduce
from drivetrain_cli.claims.output import figure

from drivetrain.errors import DrivetrainError

HEAD = f"  {'':34} {'median':>11} {'best':>11}   {'ratio (middle 80 %)':22}"
TABLES = f"""x86_64, torch 2.13, load average 3.1

adam
{HEAD} share of bandwidth
  {"torch":34} {"1.100 ms":>11} {"1.000 ms":>11}    1.00 (1.00 .. 1.00)
  {"ours":34} {"0.500 ms":>11} {"0.400 ms":>11}    2.20 (2.10 .. 2.30)    0.80 (0.70 .. 0.90)

all-reduce, 2 ranks
{HEAD}
  {"ours":34} {"10.000 ms":>11} {"9.000 ms":>11}   17.90 (17.00 .. 18.00)
"""
MARKDOWN = """
| | between nodes, MB | seconds |
|---|---|---|
| plain | 1,016.28 | 3 |
| all | 2.71 | 1 |
"""


@pytest.mark.parametrize(
    ("output", "place", "number"),
    [
        ('{"a": {"b": 0.5}}', "a > b", 0.5),
        ('rank 0 runs\n{\n "a": [1, {"b": 2}]\n}\ndone', "a > 1 > b", 2),
        ('{"first": 1}\n{"second": 2e-3}', "second", 0.002),
        ('{"a": true}', "a", None),
        ('{"a": "1"}', "a", None),
        (TABLES, "adam > ours > ratio (middle 80 %)", 2.2),
        (TABLES, "adam > torch > best", 1),
        (TABLES, "all-reduce, 2 ranks > ours > ratio (middle 80 %)", 17.9),
        (TABLES, "adam > ours > share of bandwidth", 0.8),
        (TABLES, "adam > torch > share of bandwidth", None),
        (TABLES, "all-reduce, 2 ranks > ours > best", 9),
        (TABLES, "all-reduce, 2 ranks > torch > best", None),
        (MARKDOWN, "plain > between nodes, MB", 1016.28),
        (MARKDOWN, "all > seconds", 1),
        (MARKDOWN, "all > hours", None),
    ],
)
def test_a_number_is_found_where_the_receipt_says(output, place, number) -> None:
    assert figure(output, place) == number


RECEIPT = """```receipt
id = "{id}"
command = "python benchmarks/step.py {said}"
better = "{better}"
tolerance = 0.1
hardware = "2 cores"
date = 2026-11-21

[figures]
"step > ratio" = {stated}
```
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    claims = [
        ("core-same", 2.0, "lower"),
        ("core-better", 0.5, "lower"),
        ("core-near", 2.19, "lower"),
        ("core-far", 2.21, "lower"),
        ("core-less", 1.79, "higher"),
        ("core-more", 9.0, "higher"),
        ("core-silent", "silent", "higher"),
        ("core-broken", "broken", "higher"),
        ("core-zero", 0, "lower"),
        ("core-nearly", 1e-9, "lower"),
        ("core-below", -1e-9, "higher"),
    ]
    nothing = ("core-zero", "core-nearly", "core-below")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "core").mkdir()
    (tmp_path / "benchmarks/step.py").write_text(
        "import json, sys\n"
        "said = sys.argv[1]\n"
        "if said == 'broken': sys.exit('no disk')\n"
        "print(json.dumps({} if said == 'silent' else {'step': {'ratio': float(said)}}))\n"
    )
    texts = [
        RECEIPT.format(id=name, said=said, better=better, stated=0 if name in nothing else 2.0)
        for name, said, better in claims
    ]
    (tmp_path / "core/BENCHMARKS.md").write_text("# Core\n\n" + "\n".join(texts))
    return tmp_path


def asked(*arguments: Any) -> Result:
    return CliRunner().invoke(reproduce, [str(one) for one in arguments])


@pytest.mark.parametrize(
    ("claim", "code", "says"),
    [
        ("core-same", 0, "stated 2, here 2: holds"),
        ("core-better", 0, "here 0.5: holds"),
        ("core-near", 0, "here 2.19: holds"),
        ("core-far", 1, "here 2.21: does NOT hold (lower is better, tolerance 10%)"),
        ("core-less", 1, "here 1.79: does NOT hold (higher is better"),
        ("core-more", 0, "here 9: holds"),
        ("core-silent", 3, "not measured: the command printed no such figure"),
        ("core-broken", 3, "not measured: the command ended with exit code 1"),
        # a part of nothing is nothing: where 0 is stated, only 0 or what is better holds
        ("core-zero", 0, "stated 0, here 0: holds"),
        ("core-nearly", 1, "stated 0, here 1e-09: does NOT hold"),
        ("core-below", 1, "stated 0, here -1e-09: does NOT hold"),
    ],
)
def test_a_figure_holds_if_it_is_better_or_within_its_tolerance(
    checkout, claim, code, says
) -> None:
    answer = asked("--root", checkout, claim)
    assert answer.exit_code == code
    assert says in answer.output
    assert "stated for 2 cores, 2026-11-21" in answer.output


def test_all_are_measured_and_told_as_json(checkout: Path, monkeypatch) -> None:
    (checkout / "core" / "inside").mkdir()
    monkeypatch.chdir(checkout / "core" / "inside")
    answer = asked("--all", "--json")
    assert answer.exit_code == 3
    outcomes = json.loads(answer.stdout)
    assert [one["claim"] for one in outcomes if one["holds"]] == [
        *("core-same", "core-better", "core-near", "core-more", "core-zero"),
    ]
    assert outcomes[0]["measured"] == 2.0


def test_claims_are_listed(checkout: Path) -> None:
    assert "core-far" in asked("--root", checkout).output
    assert len(json.loads(asked("--root", checkout, "--json").output)) == 11


def test_a_command_that_does_not_end_is_ended(checkout: Path) -> None:
    (checkout / "benchmarks/step.py").write_text("import time; time.sleep(60)")
    answer = asked("--root", checkout, "--timeout", 0.5, "core-same")
    assert answer.exit_code == 3
    assert "did not end within 0.5 s" in answer.output


def test_an_unknown_claim_and_a_folder_without_figures_are_refused(checkout, tmp_path) -> None:
    answer = asked("--root", checkout, "core-nera")
    assert answer.exit_code == 2
    assert "no claim is named 'core-nera'" in answer.output
    assert "core-near" in answer.output
    (tmp_path / "empty").mkdir()
    answer = asked("--root", tmp_path / "empty")
    assert isinstance(answer.exception, DrivetrainError)
    assert "in a checkout of Drivetrain" in str(answer.exception)
    assert asked("--root", checkout, "--all", "core-near").exit_code == 2
