"""Tables that packages add to ``drivetrain explain``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
from click.testing import CliRunner, Result

from drivetrain.cli import main
from drivetrain.contracts import Plugin, PositiveInt, Section
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Entry, Registry


class EngineSection(Section):
    pistons: PositiveInt = 4


class Engine(Plugin):
    name = "steam"
    sections: ClassVar = {"steam": EngineSection}


class Drawing:
    def __str__(self) -> str:
        return "oo<\noo"

    def _repr_svg_(self) -> str:
        return "<svg></svg>"


def pistons(plan: Plan) -> list[tuple[str, object]]:
    return [
        ("pistons [n]", str(plan.section(EngineSection).pistons)),
        ("seen from above", Drawing()),
        ("made of", "iron & steel"),
    ]


def nothing(plan: Plan) -> list[tuple[str, object]]:
    return []


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ("drivetrain", "drivetrain-cli")
    kept = [entry for entry in Registry.installed()._entries if entry.distribution in ours]
    added = [
        Entry("plugins", "steam", "drivetrain-steam", "0.2", f"{__name__}:Engine"),
        Entry("explain", "Pistons", "drivetrain-steam", "0.2", f"{__name__}:pistons"),
        Entry("explain", "Smoke", "drivetrain-steam", "0.2", f"{__name__}:nothing"),
        # Not active, so not even imported.
        Entry("explain", "Sails", "drivetrain-wind", "0.2", "no_such_module:rows"),
    ]
    everything = Registry([*kept, *added])
    monkeypatch.setattr(Registry, "installed", classmethod(lambda cls: everything))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"train_batch_size": 4, "steam": {"pistons": 6}}))
    return file


def drivetrain(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_an_active_plugin_adds_a_table(config: Path) -> None:
    result = drivetrain("explain", config)
    assert result.exit_code == 0, result.output
    assert "Pistons" in result.stdout
    row = next(line for line in result.stdout.splitlines() if "pistons [n]" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["pistons [n]", "6"]
    assert "oo<" in result.stdout
    for absent in ("Smoke", "Sails"):
        assert absent not in result.stdout


def test_what_no_config_names_adds_nothing(tmp_path: Path) -> None:
    file = tmp_path / "plain.json"
    file.write_text('{"train_batch_size": 4}')
    result = drivetrain("explain", file)
    assert result.exit_code == 0, result.output
    assert "Pistons" not in result.stdout


def test_a_page_shows_pictures_and_text_as_text(config: Path, tmp_path: Path) -> None:
    assert drivetrain("explain", config, "--html", tmp_path / "page.html").exit_code == 0
    text = (tmp_path / "page.html").read_text()
    assert "<h2>Pistons</h2>" in text
    assert "<svg></svg>" in text
    assert "<pre>iron &amp; steel</pre>" in text


def test_everything_is_there_as_data(config: Path) -> None:
    data = json.loads(drivetrain("explain", config, "--json").stdout)
    assert data["mesh"]["dp"] == 1
    assert data["sections"]["Pistons"][:2] == [
        {"label": "pistons [n]", "value": "6"},
        {"label": "seen from above", "value": "oo<\noo"},
    ]
    assert any("plan_batch" in hook for hook in data["hooks"])


def test_two_forms_at_once_are_refused(config: Path, tmp_path: Path) -> None:
    result = drivetrain("explain", config, "--json", "--html", tmp_path / "page.html")
    assert result.exit_code == 2
    assert "give one of them" in result.stderr


def test_the_list_of_what_is_installed_names_the_kind() -> None:
    assert "explain" in drivetrain("plugins").stdout
