"""``drivetrain test-plugin``: the conformance kit of what is installed, as a table."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import click

from drivetrain.errors import DrivetrainError, PluginError
from drivetrain.plan.registry import Registry
from drivetrain.wording import did_you_mean
from drivetrain_cli.tables import show

if TYPE_CHECKING:  # the help page of all commands imports this module, so it stays light
    from pydantic import BaseModel
    from rich.table import Table

    from drivetrain.contracts import Accelerator, Plugin


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
    """Run the conformance kit of what is installed as NAME.

    NAME is the config path that a plugin serves, or an accelerator; where it is both, both kits are
    run. The kit of an accelerator trains small models on the device.
    """
    from drivetrain.plan.config.loading import load_config, overlay

    registry = Registry.installed()
    entries = [registry.find("plugins", name), registry.find("accelerators", name)]
    found = [entry for entry in entries if entry is not None]
    if not found:
        names = [*registry.names("plugins"), *registry.names("accelerators")]
        reason = registry.missing("plugins", name) or registry.missing("accelerators", name)
        said = f"{name!r} is {reason}" if reason else f"no plugin or accelerator is named {name!r}"
        raise PluginError(said + ("" if reason else did_you_mean(name, names)))
    given = load_config(file) if file else None
    failed = checks = 0
    for entry in found:
        kind = entry.load()
        if entry.group == "plugins":
            config = overlay(given or _switched_on(name, kind, overlays), overlays)
            outcomes = run_kit(kind, config)
        else:
            outcomes = run_accelerator_kit(kind, overlay(given or {}, overlays))
        show(_table(entry.label, outcomes))
        failed += sum(outcome.failed for outcome in outcomes.values())
        checks += len(outcomes)
    if failed:
        raise DrivetrainError(f"{failed} of {checks} checks failed for {name!r}")


@dataclass(frozen=True)
class Outcome:
    """How a check went.

    Args:
        failed: whether it failed.
        reason: why it failed or was skipped; empty when it passed.
    """

    failed: bool = False
    reason: str = ""


def run_kit(kind: type[Plugin], config: Mapping[str, Any]) -> dict[str, Outcome]:
    """Run every check of :class:`PluginConformance` on a plugin class.

    Args:
        kind: the plugin's class.
        config: a config that switches it on; batch sizes may be left out.

    Returns:
        What is checked -> how it went.
    """
    from drivetrain.testing.conformance import PluginConformance

    return _outcomes(type("Kit", (PluginConformance,), {"plugin": kind, "config": config})())


def run_accelerator_kit(kind: type[Accelerator], config: Mapping[str, Any]) -> dict[str, Outcome]:
    """Run every check of :class:`AcceleratorConformance` on an accelerator's class.

    Args:
        kind: the accelerator's class.
        config: what it needs of a config.

    Returns:
        What is checked -> how it went.
    """
    from drivetrain.testing.accelerators import AcceleratorConformance

    attributes = {"accelerator": kind, "config": config}
    return _outcomes(type("Kit", (AcceleratorConformance,), attributes)())


def _outcomes(kit: object) -> dict[str, Outcome]:
    names = [name for base in reversed(type(kit).__mro__) for name in vars(base)]
    return {
        name.removeprefix("test_").replace("_", " "): _outcome(getattr(kit, name))
        for name in dict.fromkeys(names)
        if name.startswith("test_")
    }


def _outcome(check: Any) -> Outcome:
    try:
        check()
    except SkipTest as skip:
        return Outcome(reason=str(skip))
    except Exception as error:  # noqa: BLE001 - any failure of a check is its outcome
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(failed=True, reason=str(error) or f"{type(error).__name__}: {frame.line}")
    return Outcome()


def _table(title: str, outcomes: Mapping[str, Outcome]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("check", "outcome", title=title, title_justify="left")
    for check, outcome in outcomes.items():
        if outcome.failed:
            shown = f"[red]{escape(outcome.reason)}[/]"
        else:
            skipped = f"[yellow]skipped: {escape(outcome.reason)}[/]"
            shown = skipped if outcome.reason else "[green]passed[/]"
        table.add_row(check, shown)
    return table


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
