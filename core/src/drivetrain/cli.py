"""``drivetrain NAME``: finds the command in the registry, and shows errors without a traceback."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import click

from drivetrain.errors import ConfigError, DrivetrainError, PluginError
from drivetrain.paths import at_home
from drivetrain.plan.known import OWNERS, PLANNED
from drivetrain.plan.registry import Entry, Group, Registry
from drivetrain.version import __version__
from drivetrain.wording import did_you_mean


class UserPath(click.Path):
    """A path argument; ``~`` is the home folder in ``--option=~/x``, too, which shells leave."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(at_home(value), param, ctx)


_QUICK = "drivetrain-cli"
"""The distribution whose commands import quickly, so that the help page can say what they do. Other
packages may be broken or import torch; that page must be quick and whole."""


class Commands(click.Group):
    """The commands of all installed distributions; each is imported when it is needed.

    Attributes:
        kind: the entry point group in which they are.
        called: how messages call one.
    """

    kind: Group = "commands"
    called = "command"

    def list_commands(self, ctx: click.Context) -> list[str]:
        return Registry.installed().names(self.kind)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        registry = Registry.installed()
        if registry.find(self.kind, cmd_name) is None:
            return None
        command: click.Command = registry.load(self.kind, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            name, known = args[0], OWNERS.get(self.kind, {})
            hint = did_you_mean(name, [*self.list_commands(ctx), *known])
            reason = Registry.installed().missing(self.kind, name)
            problem = (
                f"{self.called} {name!r} is {reason}"
                if reason
                else f"no {self.called} is named {name!r}{hint}"
            )
            raise click.UsageError(problem, ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        entries = {entry.name: entry for entry in Registry.installed().entries(self.kind)}
        rows = {
            name: f"Not installed: pip install {owner}."
            for name, owner in OWNERS.get(self.kind, {}).items()
            if owner not in PLANNED
        }
        rows.update({name: self._summary(entry) for name, entry in entries.items()})
        with formatter.section(f"{self.called.capitalize()}s"):
            formatter.write_dl(sorted(rows.items()))

    def _summary(self, entry: Entry) -> str:
        if entry.distribution == _QUICK:
            with suppress(PluginError):
                command: click.Command = entry.load()
                return command.get_short_help_str(limit=80)
        path = "drivetrain" if self.kind == "commands" else f"drivetrain {self.kind}"
        return f"From {entry.distribution}; see {path} {entry.name} --help."


class _Main(Commands):
    """Shows errors of ours as their message."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DrivetrainError as error:
            if ctx.params["traceback"]:
                raise
            raise Failure(error) from error


class Failure(click.ClickException):
    """An error of ours, shown as its message; exit code 2."""

    exit_code = 2

    def __init__(self, error: DrivetrainError) -> None:
        text = str(error)
        if isinstance(error, ConfigError) and len(error.problems) > 1:
            listed = [f"  - {problem}" for problem in error.problems]
            text = "\n".join([f"{len(listed)} problems in the config", *listed])
        super().__init__("\n".join([text, *getattr(error, "__notes__", ())]))

    def show(self, file: Any = None) -> None:
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(self.message, err=True)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="drivetrain")
@click.option("--traceback", is_flag=True, help="Show where in the code an error comes from.")
def main(traceback: bool) -> None:
    """Train large PyTorch models from a small core and plugins."""


if __name__ == "__main__":
    main()
