"""What the commands have in common: they have help, and import nothing heavy before its time."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from drivetrain.cli import main
from drivetrain.plan.registry import Registry

COMMANDS = [
    e.name for e in Registry.installed().entries("commands") if e.value[:14] == "drivetrain_cli"
]


def test_help_says_what_every_command_does() -> None:
    assert len(COMMANDS) == 11
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in result.output
    assert "From drivetrain-cli" not in result.output
    assert "Not installed: pip install drivetrain-cli" not in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage: " in result.output


def test_a_benchmark_whose_package_is_not_there_says_which_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DRIVETRAIN_DISABLE_PLUGINS", "drivetrain-offload")
    page = CliRunner().invoke(main, ["bench", "--help"]).output
    assert re.search(r"io +Not installed: pip install drivetrain-offload\.", page)
    refused = CliRunner().invoke(main, ["bench", "io", "."])
    assert refused.exit_code == 2
    assert "benchmark 'io' is served by drivetrain-offload, which is " in refused.output
    unknown = CliRunner().invoke(main, ["bench", "disks"])
    assert "no benchmark is named 'disks'" in unknown.output


@pytest.mark.parametrize("command", ["--help", "plugins", "config schema", "run --help"])
def test_torch_is_not_imported_by(command: str) -> None:
    assert "torch" not in imported_by(command.split())


def test_neither_pydantic_nor_rich_is_imported_by_help() -> None:
    assert not {"pydantic", "rich"} & imported_by(["--help"])


@pytest.mark.parametrize("command", ["config check", "explain"])
def test_torch_is_not_imported_to_look_at_a_config(command: str, tmp_path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"train_batch_size": 8, "optimizer": {"type": "AdamW"}}')
    assert "torch" not in imported_by([*command.split(), str(file)])


def imported_by(arguments: list[str]) -> set[str]:
    code = (
        "import sys\n"
        "from drivetrain.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "print('\\nMODULES', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES ")[2].split())
