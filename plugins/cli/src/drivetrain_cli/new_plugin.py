"""``drivetrain new-plugin``: a package of one module that works, to be changed into another."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from string import Template

import click

from drivetrain import __version__
from drivetrain.cli import UserPath
from drivetrain.errors import DrivetrainError
from drivetrain.plan import known
from drivetrain.plan.registry import Group, Registry


@click.command("new-plugin")
@click.argument("name")
@click.option("--optimizer", is_flag=True, help="Make an optimizer, named after NAME.")
@click.option("--into", type=UserPath(path_type=Path), help="Folder to make; default: named so.")
def new_plugin(name: str, optimizer: bool, into: Path | None) -> None:
    """Make a package for a plugin that serves the config section NAME, with tests that pass.

    With --optimizer it is for an optimizer instead.
    """
    words = re.split("[-_]", name)
    if not all(re.fullmatch("[a-z][a-z0-9]*", word) for word in words):
        raise DrivetrainError(
            f"{name!r} is no name for a plugin: take small letters and digits, words joined by '-'"
        )
    values = _values(words)
    _refuse_taken(
        *(("optimizers", values["class_name"]) if optimizer else ("plugins", values["path"]))
    )
    folder = into or Path(values["distribution"])
    kind = "optimizer" if optimizer else "plugin"
    files = {
        "pyproject.toml": f"{kind}/pyproject.toml.in",
        "tox.ini": "tox.ini.in",
        "README.md": f"{kind}/README.md.in",
        f"src/{values['package']}/__init__.py": f"{kind}/__init__.py.in",
        f"src/{values['package']}/py.typed": None,
        f"tests/test_{values['path']}.py": f"{kind}/test.py.in",
    }
    templates = resources.files("drivetrain_cli") / "template"
    texts = {
        path: Template((templates / source).read_text("utf-8")).substitute(values) if source else ""
        for path, source in files.items()
    }
    _write(folder, texts)
    click.echo(f"made {folder}; next:\n  cd {folder}\n  pip install -e .\n  pytest tests")


def _values(words: list[str]) -> dict[str, str]:
    major, minor, *_ = __version__.split(".")
    return {
        "path": "_".join(words),
        "distribution": "-".join(["drivetrain", *words]),
        "package": "_".join(["drivetrain", *words]),
        "class_name": "".join(word.capitalize() for word in words),
        "lower": f"{major}.{minor}",
        "upper": f"{major}.{int(minor) + 1}",
    }


def _refuse_taken(group: Group, name: str) -> None:
    entry = Registry.installed().find(group, name)
    table = known.OWNERS.get(group, {}) if group == "optimizers" else known.SECTIONS
    lower = {known_name.lower(): owner for known_name, owner in table.items()}
    owner = entry.distribution if entry else lower.get(name.lower())
    if group == "optimizers" and name.lower() in (kind.lower() for kind in known.TORCH_OPTIMIZERS):
        owner = owner or "torch.optim"
    if owner:
        what = "optimizer" if group == "optimizers" else "config section"
        raise DrivetrainError(f"{what} {name!r} is served by {owner}; take another name")


def _write(folder: Path, texts: dict[str, str]) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DrivetrainError(f"{folder} exists and is not an empty folder; choose with --into")
    try:
        for path, text in texts.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, "utf-8")
    except OSError as error:
        raise DrivetrainError(f"{folder} cannot be written: {error.strerror}") from error
