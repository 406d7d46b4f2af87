"""The distributions of this repository, read from their ``pyproject.toml`` files.

A folder with a ``pyproject.toml`` under ``core/``, ``kernels/`` or ``plugins/`` is a distribution.
Nothing else lists them: test environments, wheels and house tests are derived from here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

LONG = "long-"
"""Prefix of the environment that runs only the long tests of another environment."""

MINUTES = 3.0
"""Budget of a package's ordinary tests where its ``pyproject.toml`` declares none."""

_FOLDERS = (
    "core/pyproject.toml",
    "kernels/pyproject.toml",
    "plugins/*/pyproject.toml",
    "plugins/*/*/pyproject.toml",
)


@dataclass(frozen=True)
class Distribution:
    """One separately installable package of the workspace.

    Args:
        name: canonical distribution name, e.g. ``"drivetrain-cpu"``.
        folder: absolute path of the folder with its ``pyproject.toml``.
        requirements: what it declares to need at run time.
        extras: extra name -> what that extra adds.
        test_requirements: its ``test`` dependency group: what only its own tests need.
        entry_points: entry point group -> names it registers.
        minutes: budget of its ordinary tests, from ``[tool.drivetrain]``.
    """

    name: str
    folder: Path
    requirements: tuple[Requirement, ...]
    extras: Mapping[str, tuple[Requirement, ...]] = field(default_factory=dict)
    test_requirements: tuple[Requirement, ...] = ()
    entry_points: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    minutes: float = MINUTES

    @property
    def environment(self) -> str:
        """Name of the tox environment that tests this distribution alone."""
        prefix, _, rest = self.name.partition("-")
        return rest if prefix == "drivetrain" and rest else self.folder.name.replace("_", "-")

    @property
    def packages(self) -> list[str]:
        """Import names that it provides."""
        inits = sorted(self.folder.glob("src/*/__init__.py"))
        return [init.parent.name for init in inits]

    def needs(self, extras: Iterable[str] = ()) -> list[Requirement]:
        """Run-time requirements, with those of the given extras."""
        added = [r for extra in extras for r in self.extras.get(canonicalize_name(extra), ())]
        return [*self.requirements, *added]


def load(root: Path = ROOT) -> dict[str, Distribution]:
    """All distributions below ``root``, by name, core first."""
    files = [path for pattern in _FOLDERS for path in sorted(root.glob(pattern))]
    found = [_read(path) for path in files]
    return {distribution.name: distribution for distribution in found}


def budgets(root: Path = ROOT) -> dict[str, float]:
    """Environment -> minutes that its ordinary tests may take.

    A distribution declares its own; the ``pyproject.toml`` of the workspace declares those of the
    environments that belong to none.
    """
    content = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    shared: dict[str, float] = content["tool"]["drivetrain"]["minutes"]
    return {d.environment: d.minutes for d in load(root).values()} | shared


def closure(names: Iterable[str], workspace: Mapping[str, Distribution]) -> list[Distribution]:
    """The named distributions and those of the workspace that they need, directly or not."""
    return [workspace[name] for name in _walk(names, workspace)[0]]


def external_requirements(
    names: Iterable[str], workspace: Mapping[str, Distribution], *, tests: bool = True
) -> list[Requirement]:
    """What the closure of ``names`` needs from outside the workspace, and what their tests do."""
    return _walk(names, workspace, tests)[1]


def _walk(
    names: Iterable[str], workspace: Mapping[str, Distribution], tests: bool = True
) -> tuple[list[str], list[Requirement]]:
    names = list(names)
    queue = [Requirement(name) for name in names]
    if tests:
        queue += [r for name in names for r in workspace[name].test_requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    local: dict[str, None] = {}
    external: dict[str, Requirement] = {}
    while queue:
        requirement = queue.pop(0)
        name = canonicalize_name(requirement.name)
        if name not in workspace:
            external[str(requirement)] = requirement
        elif (key := (name, frozenset(requirement.extras))) not in seen:
            seen.add(key)
            local[name] = None
            queue += workspace[name].needs(requirement.extras)
    return sorted(local), [external[text] for text in sorted(external)]


def _read(path: Path) -> Distribution:
    content = tomllib.loads(path.read_text("utf-8"))
    project = content["project"]
    extras = project.get("optional-dependencies", {})
    points = project.get("entry-points", {})
    return Distribution(
        name=canonicalize_name(project["name"]),
        folder=path.parent,
        requirements=_parse(project.get("dependencies", [])),
        extras={canonicalize_name(key): _parse(value) for key, value in extras.items()},
        test_requirements=_parse(content.get("dependency-groups", {}).get("test", [])),
        entry_points={group: tuple(names) for group, names in points.items()},
        minutes=content.get("tool", {}).get("drivetrain", {}).get("minutes", MINUTES),
    )


def _parse(texts: Iterable[str]) -> tuple[Requirement, ...]:
    return tuple(Requirement(text) for text in texts)
