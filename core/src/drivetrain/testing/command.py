"""``drivetrain test-plugin``: the conformance kit of an installed plugin, as a table."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from drivetrain.errors import DrivetrainError
from drivetrain.registry import Registry

if TYPE_CHECKING:  # the help page of all commands imports this module, so it stays light
    from pydantic import BaseModel

    from drivetrain.plugin import Plugin


@click.command("test-plugin")
@click.argument("name")
@click.option("--config", "file", help="Config that switches the plugin on; default: NAME alone.")
@click.option(
    "--set",
    "overlays",
    multiple=True,
    metavar="PATH=VALUE",
    help="Replace one value of the config; may be repeated.",
)
def test_plugin(file: str | None, name: str, overlays: tuple[str, ...]) -> None:
    """Run the conformance kit of the installed plugin that serves the config path NAME."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from drivetrain.config.loading import load_config, overlay

    registry = Registry.installed()
    kind = registry.load("plugins", name)
    given = load_config(file) if file else _switched_on(name, kind, overlays)
    outcomes = run_kit(kind, overlay(given, overlays))
    entry = registry.find("plugins", name)
    table = Table("check", "outcome", title=entry.label if entry else name, title_justify="left")
    for check, failure in outcomes.items():
        table.add_row(check, f"[red]{escape(failure)}[/]" if failure else "[green]passed[/]")
    Console().print(table)
    failed = sum(1 for failure in outcomes.values() if failure)
    if failed:
        raise DrivetrainError(f"{failed} of {len(outcomes)} checks failed for plugin {name!r}")


def run_kit(kind: type[Plugin], config: Mapping[str, Any]) -> dict[str, str]:
    """Run every check of :class:`PluginConformance` on a plugin class.

    Args:
        kind: the plugin's class.
        config: a config that switches it on; batch sizes may be left out.

    Returns:
        What is checked -> why it failed, empty when it passed.
    """
    from drivetrain.testing.conformance import PluginConformance

    kit = type("Kit", (PluginConformance,), {"plugin": kind, "config": config})()
    outcomes = {}
    for attribute in dir(kit):
        if attribute.startswith("test_"):
            words = attribute.removeprefix("test_").replace("_", " ")
            outcomes[words] = _outcome(getattr(kit, attribute))
    return outcomes


def _outcome(check: Any) -> str:
    try:
        check()
    except Exception as error:  # noqa: BLE001 - any failure of a check is its outcome
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return str(error) or f"{type(error).__name__}: {frame.line}"
    return ""


def _switched_on(name: str, kind: type[Plugin], overlays: Iterable[str]) -> dict[str, Any]:
    """The smallest config that names the plugin and has it take part."""
    from pydantic import RootModel

    model: type[BaseModel] | None = kind.sections.get(name)
    if model is None:
        return {"plugins": {name: True}}
    if issubclass(model, RootModel):
        if any(assignment.partition("=")[0].strip() == name for assignment in overlays):
            return {}
        raise DrivetrainError(f"{name} is a single value; give one: --set {name}=VALUE")
    section: Any = {"enabled": True} if "enabled" in model.model_fields else {}
    for key in reversed(name.split(".")):
        section = {key: section}
    return dict(section)
