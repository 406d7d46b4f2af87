"""``drivetrain config``: check one config, or print the JSON Schema of all of them."""

from __future__ import annotations

import json
from typing import Any

import click

from drivetrain.plan.registry import Registry
from drivetrain.wording import printable

OVERLAY_OPTION = click.option(
    "--set",
    "overlays",
    multiple=True,
    metavar="PATH=VALUE",
    help="Replace one value, e.g. zero_optimization.stage=2; may be repeated.",
)
WORLD_SIZE_OPTION = click.option(
    "--world-size", type=int, metavar="N", help="Number of ranks; default: WORLD_SIZE, else 1."
)


@click.group()
def config() -> None:
    """Check a config, or print the JSON Schema of everything installed."""


@config.command()
@click.argument("file")
@OVERLAY_OPTION
@WORLD_SIZE_OPTION
def check(file: str, overlays: tuple[str, ...], world_size: int | None) -> None:
    """Check the config FILE as a job would, without a device; every problem is shown.

    Exit code 2 when there is one.
    """
    from drivetrain.plan.plan import Plan

    plan = Plan.build(file, overlays=overlays, world_size=world_size)
    explanation = plan.explain()
    click.secho(f"{printable(file)} is valid", fg="green")
    for name, (value, source) in explanation.values.items():
        click.echo(f"  {name} = {value} ({source})")
    for note in explanation.notes:
        click.echo(f"  note: {note}")


@config.command()
def schema() -> None:
    """Print the JSON Schema of all sections that installed plugins serve, for editors."""
    click.echo(json.dumps(json_schema(Registry.installed()), indent=2))


def json_schema(registry: Registry) -> dict[str, Any]:
    """One schema for whole configs; a dotted path is grafted into its parent's section.

    Raises:
        PluginError: a plugin does not load.
    """
    definitions: dict[str, Any] = {}
    root: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
    root["properties"]["plugins"] = {
        "type": "object",
        "description": "path -> distribution that serves it, or true to activate a plugin",
        "additionalProperties": {"anyOf": [{"type": "string"}, {"const": True}]},
    }
    for path in registry.names("plugins"):  # sorted, so that a section comes before its parts
        model = registry.load("plugins", path).sections.get(path)
        if model is None:
            continue
        section = model.model_json_schema(ref_template=f"#/$defs/{path}.{{model}}")
        for other, key in getattr(model, "renamed", {}).items():
            section["properties"][other] = {**section["properties"][key], "deprecated": True}
        for name, definition in section.pop("$defs", {}).items():
            definitions[f"{path}.{name}"] = definition
        *parents, key = path.split(".")
        _object(root, parents, definitions)["properties"][key] = section
    root["properties"] = dict(sorted(root["properties"].items()))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Drivetrain config",
        **root,
        "$defs": definitions,
    }


def _object(schema: dict[str, Any], path: list[str], definitions: dict[str, Any]) -> dict[str, Any]:
    """The object schema at ``path``; objects on the way that nobody describes are created."""
    for key in path:
        schema = schema["properties"].setdefault(key, {"type": "object", "properties": {}})
        while "properties" not in schema:  # an optional section: look through to its object
            alternatives = [s for s in schema.get("anyOf", [schema]) if s.get("type") != "null"]
            reference = alternatives[0].get("$ref", "").removeprefix("#/$defs/")
            schema = definitions[reference] if reference else alternatives[0]
            schema.setdefault("properties", {})
    return schema
