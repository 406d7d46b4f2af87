"""The command line as a whole: finding commands, showing errors, staying light."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from drivetrain import __version__
from drivetrain.cli import main
from drivetrain.errors import ConfigError, PluginError
from drivetrain.plan.registry import Entry, Registry, core_entries


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch):
    """Make the command line find more commands than are installed."""

    def offering(name: str, value: str, target: object = None) -> None:
        entry = Entry("commands", name, "somebody", "1.0", value, target=target)
        everything = [*Registry.installed()._entries, entry]
        monkeypatch.setattr(Registry, "installed", classmethod(lambda cls: Registry(everything)))

    return offering


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Core seems to be all that is installed."""
    monkeypatch.setattr(Registry, "installed", classmethod(lambda cls: Registry(core_entries())))


def raising(error: Exception) -> click.Command:
    @click.command()
    def fail() -> None:
        raise error

    return fail


def test_help_says_how_to_get_a_command_that_is_missing(bare) -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name in ("run", "report", "plugins", "config", "explain", "new-plugin", "test-plugin"):
        row = next(row for row in result.output.splitlines() if row.startswith(f"  {name} "))
        assert row.endswith("Not installed: pip install drivetrain-cli."), row


def test_version_is_cores() -> None:
    assert __version__ in CliRunner().invoke(main, ["--version"]).output


def test_a_misspelt_command_is_refused_with_a_suggestion() -> None:
    result = CliRunner().invoke(main, ["explian"])
    assert result.exit_code == 2
    assert "no command is named 'explian'; did you mean 'explain'?" in result.stderr


def test_a_command_that_is_not_installed_says_what_to_install(bare) -> None:
    result = CliRunner().invoke(main, ["run", "train.py"])
    assert result.exit_code == 2
    wanted = "command 'run' is served by drivetrain-cli, which is not installed: pip install"
    assert wanted in result.stderr
    assert "did you mean 'run'?" in CliRunner().invoke(main, ["rnu"]).stderr


def test_a_command_of_another_distribution_is_found(offer) -> None:
    offer("hello", "unused", click.command("hello")(lambda: click.echo("hello there")))
    assert CliRunner().invoke(main, ["hello"]).output == "hello there\n"


def test_a_command_that_does_not_load_leaves_the_help_page_usable(offer) -> None:
    offer("broken", "no_such_module:command")
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert "From somebody; see drivetrain broken --help." in result.output
    assert "\n  config " in result.output


def test_an_error_of_ours_is_a_message_without_traceback_and_exit_code_2(offer) -> None:
    offer("fail", "unused", raising(PluginError("the plugin is odd")))
    result = CliRunner().invoke(main, ["fail"])
    assert result.exit_code == 2
    assert result.stderr == "error: the plugin is odd\n"
    assert result.stdout == ""


def test_all_problems_of_a_config_are_listed(offer) -> None:
    offer("fail", "unused", raising(ConfigError(["a.b: wrong", "c: unknown key"])))
    result = CliRunner().invoke(main, ["fail"])
    assert result.stderr == "error: 2 problems in the config\n  - a.b: wrong\n  - c: unknown key\n"


def test_notes_on_an_error_are_shown(offer) -> None:
    error = PluginError("the plugin is odd")
    error.add_note("raised by plugin 'odd' in hook 'configure'")
    offer("fail", "unused", raising(error))
    result = CliRunner().invoke(main, ["fail"])
    assert "raised by plugin 'odd' in hook 'configure'" in result.stderr


def test_the_traceback_is_there_for_those_who_ask(offer) -> None:
    error = PluginError("the plugin is odd")
    offer("fail", "unused", raising(error))
    assert CliRunner().invoke(main, ["--traceback", "fail"]).exception is error


def test_a_bug_is_no_error_of_ours_and_keeps_its_traceback(offer) -> None:
    offer("fail", "unused", raising(ZeroDivisionError()))
    result = CliRunner().invoke(main, ["fail"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_help_imports_no_torch_pydantic_or_rich() -> None:
    assert not {"torch", "pydantic", "rich"} & imported_by(["--help"])


def imported_by(arguments: list[str]) -> set[str]:
    code = (
        "import sys\n"
        "from drivetrain.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "print('\\nMODULES', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES ")[2].split())
