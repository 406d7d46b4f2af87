"""Hold the workspace's packages to who may import whom, with import-linter.

1. Core imports no plugin and no kernel.
2. Kernels import no plugin, and plugins never each other.
3. The modules that a config is checked with never ask for torch themselves.
4. The rooms of core import downwards only, types included; the exceptions are listed here.
"""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import workspace

LIGHT = tuple(
    f"drivetrain.{name}"
    for name in (
        *("errors", "wording", "version", "lazy", "cli", "plan", "sections", "contracts.plugin"),
        *("contracts.world.axis", "contracts.loop.batch"),
    )
)
"""Modules that must import without torch; a test imports each of them."""

ROOMS = (
    *("engine", "modules", "states", "checkpoint", "optimization", "precision"),
    *("job", "sections", "communication", "plan", "contracts"),
)
"""The rooms of core, from the top down: each may import those after it."""

UPWARDS = (
    # Hooks are called with objects of every room; nothing but their types is named.
    "contracts.plugin.hookspecs -> drivetrain.checkpoint.format.commit",
    "contracts.plugin.hookspecs -> drivetrain.engine.engine",
    "contracts.plugin.hookspecs -> drivetrain.job.job",
    "contracts.plugin.hookspecs -> drivetrain.plan.plan",
    "contracts.world.accelerator -> drivetrain.plan.plan",
    # A job is the one door that opens upwards.
    "job.job -> drivetrain.engine.compose",
    "job.job -> drivetrain.engine.engine",
)
"""Imports between rooms that look up."""

LINTER = Path(sys.executable).with_name("lint-imports")


def contracts(packages: Iterable[str]) -> configparser.ConfigParser:
    """The contracts for these import packages, as import-linter reads them."""
    everything = sorted(packages)
    plugins = [name for name in everything if name not in ("drivetrain", "drivetrain_kernels")]
    kernels = [name for name in everything if name == "drivetrain_kernels"]
    config = configparser.ConfigParser()
    config["importlinter"] = {
        "root_packages": _lines(everything),
        "include_external_packages": "True",
        "exclude_type_checking_imports": "True",
    }
    config["importlinter:contract:core"] = {
        "name": "core imports no plugin and no kernel",
        "type": "forbidden",
        "source_modules": "drivetrain",
        "forbidden_modules": _lines([*kernels, *plugins]),
    }
    config["importlinter:contract:light"] = {
        "name": "light modules never ask for torch",
        "type": "forbidden",
        "source_modules": _lines(LIGHT),
        "forbidden_modules": "torch",
        # hooks import what they build; that importing stays light is tested
        "allow_indirect_imports": "True",
    }
    if kernels and plugins:
        config["importlinter:contract:kernels"] = {
            "name": "kernels import no plugin",
            "type": "forbidden",
            "source_modules": "drivetrain_kernels",
            "forbidden_modules": _lines(plugins),
        }
    if len(plugins) > 1:
        config["importlinter:contract:plugins"] = {
            "name": "plugins do not import each other",
            "type": "independence",
            "modules": _lines(plugins),
        }
    return config


def rooms() -> configparser.ConfigParser:
    """The contract of core's rooms; unlike the others it counts imports of types too."""
    config = configparser.ConfigParser()
    config["importlinter"] = {"root_packages": _lines(["drivetrain"])}
    config["importlinter:contract:rooms"] = {
        "name": "rooms of core import downwards",
        "type": "layers",
        "containers": "drivetrain",
        "layers": _lines(ROOMS),
        "ignore_imports": _lines(f"drivetrain.{arrow}" for arrow in UPWARDS),
    }
    return config


def main() -> int:
    """Check the packages in the working tree; return import-linter's exit status."""
    distributions = workspace.load().values()
    packages = [package for d in distributions for package in d.packages]
    sources = os.pathsep.join(str(d.folder / "src") for d in distributions)
    return max(_lint(config, sources) for config in (contracts(packages), rooms()))


def _lint(config: configparser.ConfigParser, sources: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "contracts.ini")
        with path.open("w", encoding="utf-8") as file:
            config.write(file)
        command = [str(LINTER), "--config", str(path), "--no-cache"]
        environment = {**os.environ, "PYTHONPATH": sources}
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def _lines(names: Iterable[str]) -> str:
    return "\n" + "\n".join(names)


if __name__ == "__main__":
    sys.exit(main())
