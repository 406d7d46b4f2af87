"""``drivetrain config`` and ``drivetrain explain``: looking at a config without running it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest
from click.testing import CliRunner, Result
from drivetrain_cli.config import json_schema
from drivetrain_cli.explain import PHASES, WHEN

from drivetrain.cli import main
from drivetrain.contracts import Plugin, PositiveInt, Scalar, Section
from drivetrain.plan.hub import HOOKS
from drivetrain.plan.registry import Registry

GOOD = {
    "train_batch_size": 32,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(GOOD))
    return file


def drivetrain(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# -- check -------------------------------------------------------------------------------------


def test_a_valid_config_shows_where_its_numbers_come_from(config: Path) -> None:
    result = drivetrain("config", "check", config, "--world-size", 2)
    assert result.exit_code == 0
    assert f"{config} is valid" in result.stdout
    assert "train_batch_size = 32 (config)" in result.stdout
    assert "train_micro_batch_size_per_gpu = 4 (derived from the others)" in result.stdout
    assert "world_size = 2" in result.stdout


def test_set_replaces_a_value_before_the_check(config: Path) -> None:
    result = drivetrain("config", "check", config, "--set", "train_batch_size=64")
    assert "train_batch_size = 64" in result.stdout


def test_every_problem_is_on_a_line_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text('{"train_batch_size": "8", "optimiser": {"type": "AdamW"}}')
    result = drivetrain("config", "check", file)
    assert result.exit_code == 2
    assert result.stdout == ""
    first, *problems = result.stderr.splitlines()
    assert first == "error: 2 problems in the config"
    assert any("train_batch_size" in line and '"8"' in line for line in problems)
    assert any("did you mean 'optimizer'?" in line for line in problems)


def test_a_syntax_error_is_shown_where_it_is(tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text('{\n  "train_batch_size" 8\n}')
    result = drivetrain("config", "check", file)
    assert result.exit_code == 2
    assert "line 2, column 22" in result.stderr


def test_a_missing_file_is_one_message(tmp_path: Path) -> None:
    result = drivetrain("config", "check", tmp_path / "no.json")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_file_name_takes_no_command_of_the_terminal(tmp_path: Path) -> None:
    named = tmp_path / "\x1b[31m\u202e.json"
    assert "\x1b" not in drivetrain("config", "check", named).stderr
    named.write_text(json.dumps(GOOD))
    result = drivetrain("config", "check", named)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "\\x1b[31m\\u202e.json is valid" in result.stdout
    named.write_text('{"\x9b31m": 1}')
    assert "\x9b" not in drivetrain("config", "check", named).stderr


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.json").write_text(json.dumps(GOOD))
    assert drivetrain("config", "check", "~/c.json").exit_code == 0
    assert drivetrain("explain", "~/c.json", "--html=~/page.html").exit_code == 0
    assert (tmp_path / "page.html").is_file()
    assert not (tmp_path / "~").exists()


# -- schema ------------------------------------------------------------------------------------


def test_the_schema_has_every_section_of_core() -> None:
    schema = json.loads(drivetrain("config", "schema").stdout)
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert {"train_batch_size", "optimizer", "fp16", "gradient_clipping"} <= set(
        schema["properties"]
    )
    assert schema["properties"]["fp16"]["properties"]["enabled"]["type"] == "boolean"


class Disk(Section):
    path: str


class OuterSection(Section):
    every: PositiveInt = 1
    disk: Disk | None = None


class InnerSection(Section):
    disk: Disk


class Outer(Plugin):
    name = "outer"
    sections = {"outer": OuterSection, "lonely.part": Scalar[int]}


class Inner(Plugin):
    name = "inner"
    sections = {"outer.inner": InnerSection, "outer.disk.speed": Scalar[float]}


def test_a_dotted_path_is_grafted_into_the_section_above_it() -> None:
    schema = json_schema(Registry([]).with_plugins(Outer, Inner))
    outer = schema["properties"]["outer"]
    assert set(outer["properties"]) == {"every", "disk", "inner"}
    reference = outer["properties"]["inner"]["properties"]["disk"]["$ref"]
    assert schema["$defs"][reference.removeprefix("#/$defs/")]["required"] == ["path"]


def test_a_dotted_path_is_grafted_into_an_optional_object() -> None:
    schema = json_schema(Registry([]).with_plugins(Outer, Inner))
    assert schema["$defs"]["outer.Disk"]["properties"]["speed"]["type"] == "number"
    assert "speed" not in schema["$defs"]["outer.inner.Disk"]["properties"]


def test_other_names_of_keys_are_in_the_schema() -> None:
    class Renaming(Section):
        renamed: ClassVar[dict[str, str]] = {"old": "new"}
        new: PositiveInt = 1

    class Renamed(Plugin):
        name = "renamed"
        sections = {"renamed": Renaming}

    found = json_schema(Registry([]).with_plugins(Renamed))["properties"]["renamed"]["properties"]
    assert found["old"] == {**found["new"], "deprecated": True}


def test_a_section_that_nobody_describes_is_an_object_around_its_parts() -> None:
    schema = json_schema(Registry([]).with_plugins(Outer))
    assert schema["properties"]["lonely"]["properties"]["part"]["type"] == "integer"


# -- explain -----------------------------------------------------------------------------------


def test_every_hook_has_its_place_in_the_way_of_a_job() -> None:
    placed = [hook for hooks in PHASES.values() for hook in hooks]
    assert sorted(placed) == sorted(HOOKS)
    assert set(WHEN) == set(PHASES)


def test_explain_shows_plugins_values_mesh_and_hooks(config: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = drivetrain("explain", config, "--world-size", 2)
    assert result.exit_code == 0
    for text in ("Plugins", "Values", "Mesh", "Hooks", "plugin 'batch'", "plan_batch"):
        assert text in result.stdout
    row = next(line for line in result.stdout.splitlines() if "train_micro_batch" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        "train_micro_batch_size_per_gpu",
        "4",
        "derived from the others",
    ]


def test_explain_shows_dtype_optimizer_and_stage_in_whole(config: Path) -> None:
    extra = ["--set", "bf16.enabled=true", "--set", "checkpoint.keep_last=3"]
    result = drivetrain("explain", config, *extra)
    rows = [[c.strip() for c in line.split("│")] for line in result.stdout.splitlines()]
    assert ["", "dtype", "bf16", "bf16.enabled", ""] in rows
    assert ["", "optimizer", 'AdamW {"lr": 0.001}', "config", ""] in rows
    assert ["", "gradient_clipping", "1.0", "default", ""] in rows
    assert "…" not in result.stdout


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(config: Path, tmp_path) -> None:
    result = drivetrain("explain", config, "--html", tmp_path / "page.html")
    assert result.exit_code == 0
    text = (tmp_path / "page.html").read_text()
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert not checker.links
    assert "$" not in text
    for moment in PHASES:
        assert f"<h3>{moment}</h3>" in text
    assert "plan_batch" in text


def test_the_page_shows_a_file_name_as_text(tmp_path: Path) -> None:
    file = tmp_path / "<b>&.json"
    file.write_text(json.dumps(GOOD))
    drivetrain("explain", file, "--html", tmp_path / "page.html")
    assert "&lt;b&gt;&amp;.json" in (tmp_path / "page.html").read_text()


def test_a_page_that_cannot_be_written_is_one_message(config: Path, tmp_path) -> None:
    result = drivetrain("explain", config, "--html", tmp_path / "no" / "page.html")
    assert result.exit_code == 2
    assert "cannot be written: No such file or directory" in result.stderr


def test_explain_refuses_what_check_refuses(tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text('{"train_batch_sise": 8}')
    result = drivetrain("explain", file)
    assert result.exit_code == 2
    assert "did you mean 'train_batch_size'?" in result.stderr


class Checker(HTMLParser):
    """Collects elements that are not closed, and references to other resources."""

    VOID = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag
