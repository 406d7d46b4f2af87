"""Hold the workspace's packages to who may import whom, with import-linter.

1. Core imports no plugin and no kernel.
2. Kernels import no plugin, and plugins never each other.
3. The modules that a config is checked with never ask for torch themselves.
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
        *("errors", "section", "plugin", "hookspecs", "registry", "known", "hub", "config"),
        *("batch", "mesh_layout", "plan", "builtin", "cli", "wording"),
    )
)
"""Modules that must import without torch; a test imports each of them."""

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


def main() -> int:
    """Check the packages in the working tree; answers import-linter's exit status."""
    distributions = workspace.load().values()
    packages = [package for d in distributions for package in d.packages]
    sources = os.pathsep.join(str(d.folder / "src") for d in distributions)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "contracts.ini")
        with path.open("w", encoding="utf-8") as file:
            contracts(packages).write(file)
        command = [str(LINTER), "--config", str(path), "--no-cache"]
        environment = {**os.environ, "PYTHONPATH": sources}
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def _lines(names: Iterable[str]) -> str:
    return "\n" + "\n".join(names)


if __name__ == "__main__":
    sys.exit(main())
