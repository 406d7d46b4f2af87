"""Write the reference pages of the documentation from the code; with --check, only compare.

Config keys come from the section models of everything that the workspace's distributions serve,
hooks from ``hookspecs.py``, commands from click. Prints what it wrote; exits 1 when ``--check``
finds a stale page.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import click
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drivetrain_cli.explain import PHASES, WHEN

from drivetrain.cli import main as command_line
from drivetrain.contracts.plugin import hookspecs
from drivetrain.plan import known
from drivetrain.plan.hub import HOOKS
from drivetrain.plan.registry import Entry, Registry
from tools import workspace
from tools.api_page import api_page
from tools.catalogue import catalogue_page
from tools.docstrings import one_line, prose
from tools.moving_page import moving_page

REFERENCE = workspace.ROOT / "docs" / "reference"
NOTICE = "<!-- written by tools/generate_docs.py; change the code instead -->\n"

CONFIG_INTRODUCTION = """\
A config is a dict, a JSON file (comments and trailing commas are fine) or a YAML file. A key that
nobody owns is an error, also with `"auto"`, which means the default. `drivetrain config schema`
prints the same as a JSON Schema for editors.
"""

DEEPSPEED_INTRODUCTION = """\
# What an engine lacks

Attributes and methods of DeepSpeed's engine that scripts use, and what to use here. The error of a
script that asks for one says the same. See [Moving from DeepSpeed](../moving-from-deepspeed.md).

| of DeepSpeed's engine | in its place |
|---|---|"""

Schema = Mapping[str, Any]


def main() -> int:
    """Write or check all pages; answers the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    check = parser.parse_args().check
    if missing := not_installed():
        print(f"pages tell of what is installed, and here is not: {', '.join(missing)}; make setup")
        return 1
    stale = [path for path, text in pages().items() if _read(path) != text]
    for path in stale:
        name = path.relative_to(workspace.ROOT)
        print(f"{name} is stale; run: python tools/generate_docs.py" if check else f"wrote {name}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages()[path], "utf-8")
    return 1 if check and stale else 0


def not_installed() -> list[str]:
    """Distributions of the workspace whose entry points this environment lacks."""
    installed: dict[str, set[tuple[str, str]]] = {
        canonicalize_name(found.name): {(point.group, point.name) for point in found.entry_points}
        for found in distributions()
    }
    declared = {
        name: {(group, point) for group, points in d.entry_points.items() for point in points}
        for name, d in workspace.load().items()
    }
    return [n for n, points in declared.items() if not points <= installed.get(n, set())]


def pages() -> dict[Path, str]:
    """Path -> content of every reference page."""
    registry = Registry.installed()
    texts = {
        "config.md": config_page(registry),
        "hooks.md": hooks_page(registry),
        "cli.md": cli_page(),
        "deepspeed.md": deepspeed_page(),
        "optimizers.md": catalogue_page(registry, kind),
        "python.md": api_page(),
    }
    pages = {REFERENCE / name: text for name, text in texts.items()}
    pages[REFERENCE.parent / "moving-from-deepspeed.md"] = moving_page()
    return {path: f"{NOTICE}\n{text}" for path, text in pages.items()}


# -- config --------------------------------------------------------------------------------------


def config_page(registry: Registry) -> str:
    """Every key of every section, by distribution."""
    parts = [
        "# Config keys\n",
        CONFIG_INTRODUCTION,
    ]
    for distribution in workspace.load().values():
        entries = [e for e in registry.entries("plugins") if e.distribution == distribution.name]
        if entries:
            parts.append(f"## {distribution.name}\n")
            parts += [_section(entry) for entry in entries]
    return "\n".join(parts)


def _section(entry: Entry) -> str:
    model = entry.load().sections[entry.name]
    schema = model.model_json_schema()
    lines = [f"### `{entry.name}`\n", f"{one_line(schema.get('description', ''))}\n"]
    rows = list(_keys(schema, schema.get("$defs", {})))
    if rows:
        lines += ["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""]
    elif "properties" not in schema:
        default = model.model_fields["root"].get_default(call_default_factory=True)
        lines.append(f"Value: {kind(schema, {})}; default `{json.dumps(default)}`.\n")
    return "\n".join(lines)


def _keys(schema: Schema, definitions: Schema, prefix: str = "") -> Iterator[str]:
    """A table row for every key, and for every key of sections in it."""
    for name, field in schema.get("properties", {}).items():
        inner = _resolved(field, definitions)
        if "properties" in inner:
            yield from _keys(inner, definitions, f"{prefix}{name}.")
            continue
        default = f"`{json.dumps(field['default'])}`" if "default" in field else "required"
        if name not in schema.get("required", ()) and default == "required":
            default = "empty"  # a list or an object of its own for each
        meaning = one_line(field.get("description", ""))
        value = kind(field, definitions).replace("|", "\\|")
        yield f"| `{prefix}{name}` | {value} | {default} | {meaning} |"


def _resolved(field: Schema, definitions: Schema) -> Schema:
    reference = field.get("$ref", "").rpartition("/")[2]
    return definitions[reference] if reference else field


def kind(field: Schema, definitions: Schema) -> str:
    """What values a JSON Schema allows, in words."""
    field = _resolved(field, definitions)
    if "anyOf" in field:
        kinds = [kind(each, definitions) for each in field["anyOf"]]
        return " or ".join(k for k in kinds if k != "null") or "null"
    if "enum" in field:
        return " or ".join(f'`"{value}"`' for value in field["enum"])
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "prefixItems" in field:
        return f"list of {len(field['prefixItems'])} numbers"
    if field.get("type") == "array":
        return f"list of {kind(field.get('items', {}), definitions)}"
    words = {"boolean": "true or false", "object": "object", None: "anything"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    name = field.get("type")
    return " ".join([words.get(name, str(name)), " and ".join(limits)]).strip()


# -- hooks ---------------------------------------------------------------------------------------


def hooks_page(registry: Registry) -> str:
    """Every hook with its signature, contract, and who takes part in it."""
    users = _users(registry)
    parts = [
        "# Hooks\n",
        f"{inspect.getdoc(hookspecs)}\n",
        f"These are the hooks of version {hookspecs.HOOKSPEC_VERSION}.\n",
    ]
    order = [(moment, name) for moment, names in PHASES.items() for name in names]
    shown = ""
    for moment, name in order:
        if moment != shown:
            parts.append(f"## {moment.capitalize()}: {WHEN[moment]}\n")
            shown = moment
        parts.append(_hook(name, users.get(name, [])))
    return prose("\n".join(parts))


def _hook(name: str, users: list[str]) -> str:
    function = getattr(hookspecs, name)
    signature = str(inspect.signature(function)).replace("'", "")
    who = ", ".join(users) or "no plugin of this repository yet"
    return (
        f"### `{name}`\n\n```python\ndef {name}{signature}: ...\n```\n\n"
        f"{inspect.getdoc(function)}\n\nImplemented by: {who}.\n"
    )


def _users(registry: Registry) -> dict[str, list[str]]:
    """Hook -> the classes of the workspace that implement it, with their distributions."""
    own = set(workspace.load())
    found: dict[str, dict[str, None]] = {}
    for group in ("plugins", "accelerators"):
        for entry in registry.entries(group):
            if entry.distribution not in own:
                continue
            cls = entry.load()
            for hook in HOOKS:
                if hasattr(getattr(cls, hook, None), "drivetrain_impl"):
                    found.setdefault(hook, {})[f"`{cls.__name__}` ({entry.distribution})"] = None
    return {hook: list(users) for hook, users in found.items()}


# -- DeepSpeed -------------------------------------------------------------------------------------


def deepspeed_page() -> str:
    """What to use in the place of attributes that an engine lacks."""
    rows = [
        f"| `{name}` | {one_line(_marked(use))} |" for name, use in sorted(known.ENGINE.items())
    ]
    return "\n".join([DEEPSPEED_INTRODUCTION, *rows, ""])


def _marked(text: str) -> str:
    """A sentence with its code marked as such."""
    call = r"drivetrain_\w+\.\w+(?:\(engine\))?"
    attribute = r"engine\.[\w.]*\w(?:\([^)]*\))?"
    other = r"int\(.*?\]\)|type\(.*?\)\.\w+|pip install [\w-]+|drivetrain explain CONFIG"
    return re.sub(f"{other}|{call}|{attribute}", lambda found: f"`{found[0]}`", text)


# -- command line --------------------------------------------------------------------------------


def cli_page() -> str:
    """The help page of every command."""
    parts = ["# Command line\n"]
    for words, command in _commands(command_line, ["drivetrain"]):
        context = click.Context(command, info_name=" ".join(words), terminal_width=88)
        context.max_content_width = 88
        parts.append(f"## `{' '.join(words)}`\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def _commands(
    command: click.Command, words: list[str]
) -> Iterator[tuple[list[str], click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=" ".join(words))
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None:
                yield from _commands(inner, [*words, name])


def _read(path: Path) -> str | None:
    return path.read_text("utf-8") if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
