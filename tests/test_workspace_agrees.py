"""What is written down about the packages agrees with the packages there are."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import drivetrain
from drivetrain.plan import known
from drivetrain.plan.core_entries import ENTRIES
from tools import check_imports, run_suite, workspace

WORKSPACE = workspace.load()
DISTRIBUTIONS = list(WORKSPACE.values())
SHARED = {"checkpoints", "examples", "frameworks", "integration"}
"""Environments with tests that belong to no distribution."""
each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: d.name)


@each_distribution
def test_every_served_section_is_in_the_table_of_known_names(
    distribution: workspace.Distribution,
) -> None:
    if distribution.name == "drivetrain":
        return
    paths = distribution.entry_points.get("drivetrain.plugins", ())
    assert {path: known.SECTIONS.get(path) for path in paths} == dict.fromkeys(
        paths, distribution.name
    )


@each_distribution
@pytest.mark.parametrize("group", ["optimizers", "commands", "bench"])
def test_every_served_optimizer_and_command_is_in_the_table_of_known_names(
    distribution: workspace.Distribution, group: str
) -> None:
    if distribution.name == "drivetrain":
        return
    # What core has itself, nobody has to be told to install.
    names = set(distribution.entry_points.get(f"drivetrain.{group}", ()))
    names -= ENTRIES.get(group, {}).keys()
    table = known.OWNERS[group]
    assert {name: table.get(name) for name in names} == dict.fromkeys(names, distribution.name)


def test_every_gpus_accelerator_is_in_the_table_of_known_names() -> None:
    served = {
        name: d.name
        for d in DISTRIBUTIONS
        for name in d.entry_points.get("drivetrain.accelerators", ())
    }
    assert served == {**known.OWNERS["accelerators"], "cpu": "drivetrain-cpu"}


def test_the_table_of_known_names_promises_no_section_that_its_owner_lacks() -> None:
    broken = {
        path: owner
        for path, owner in known.SECTIONS.items()
        if owner in WORKSPACE
        and path not in WORKSPACE[owner].entry_points.get("drivetrain.plugins", ())
    }
    assert not broken


def test_what_is_planned_does_not_exist_and_everything_else_that_is_named_does() -> None:
    named = {owner for table in known.OWNERS.values() for owner in table.values()}
    assert named - set(WORKSPACE) == known.PLANNED


def test_every_distribution_has_a_test_environment_of_its_own() -> None:
    names = [distribution.environment for distribution in DISTRIBUTIONS]
    assert len(set(names)) == len(names)
    assert not {"lint", "docs", *SHARED} & set(names)
    assert not [name for name in names if name.startswith(workspace.LONG)]
    config = configparser.ConfigParser(interpolation=None)
    config.read(workspace.ROOT / "tox.ini", "utf-8")
    sections = {s.removeprefix("testenv:") for s in config.sections() if s.startswith("testenv:")}
    ordinary = {section.removeprefix(f"{{,{workspace.LONG}}}") for section in sections}
    assert ordinary - set(names) == {"lint", "docs", *SHARED}
    # settings of tests hold in the long environment as well
    assert sections & {*names, *SHARED} == set()


def test_every_environment_with_tests_has_a_budget_of_minutes() -> None:
    cheap, alone = run_suite.environments()
    assert set(workspace.budgets()) == {*cheap, *alone} - {"lint"}


def test_the_suite_runs_no_long_environment() -> None:
    cheap, alone = run_suite.environments()
    assert not [name for name in (*cheap, *alone) if name.startswith(workspace.LONG)]


def test_the_readme_lists_exactly_the_packages_that_exist() -> None:
    text = (workspace.ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| \[`([\w-]+)`\]\(([\w/]+)/\) \|", text, re.MULTILINE)
    folders = {d.name: str(d.folder.relative_to(workspace.ROOT)) for d in DISTRIBUTIONS}
    assert dict(rows) == folders


def test_import_contracts_name_every_package() -> None:
    packages = {package for d in DISTRIBUTIONS for package in d.packages}
    found = check_imports.contracts(packages)
    assert set(found["importlinter"]["root_packages"].split()) == packages
    forbidden = found["importlinter:contract:core"]["forbidden_modules"]
    assert set(forbidden.split()) == packages - {"drivetrain"}


def test_an_import_between_plugins_breaks_a_contract(tmp_path: Path) -> None:
    for name, text in {"one": "import drivetrain_two", "two": ""}.items():
        package = tmp_path / f"drivetrain_{name}"
        package.mkdir()
        (package / "__init__.py").write_text(text)
    config = check_imports.contracts(["drivetrain", "drivetrain_one", "drivetrain_two"])
    with (tmp_path / "contracts.ini").open("w") as file:
        config.write(file)
    done = subprocess.run(
        [check_imports.LINTER, "--config", str(tmp_path / "contracts.ini"), "--no-cache"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "plugins do not import each other BROKEN" in done.stdout
    assert "drivetrain_one is not allowed to import drivetrain_two" in done.stdout
    assert "core imports no plugin and no kernel KEPT" in done.stdout


def test_the_guide_names_files_that_exist() -> None:
    text = (workspace.ROOT / "docs" / "architecture.md").read_text("utf-8")
    guide = text.partition("### Where is ...?")[2].partition("\n## ")[0]
    named = re.findall(r"`([\w/]+\.py)`", guide)
    folders = [d.folder / "src" for d in DISTRIBUTIONS]
    folders.append(workspace.ROOT / "core" / "src" / "drivetrain")
    assert len(named) >= 20
    assert [n for n in named if not any((folder / n).is_file() for folder in folders)] == []


def test_light_modules_import_no_torch() -> None:
    modules = check_imports.LIGHT
    code = f"""
import importlib, pkgutil, sys
for name in {modules!r}:
    module = importlib.import_module(name)
    for inner in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        importlib.import_module(inner.name)
        assert "torch" not in sys.modules, inner.name
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def pins(path: str) -> dict[str, Requirement]:
    """The pins in a file of constraints, by name."""
    lines = (workspace.ROOT / path).read_text("utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in found)
    return {canonicalize_name(pin.name): pin for pin in found}


def test_constraints_pin_everything_that_a_distribution_declares() -> None:
    declared = workspace.external_requirements(WORKSPACE, WORKSPACE)
    pinned = pins("constraints.txt")
    assert not {canonicalize_name(r.name) for r in declared} - set(pinned)
    too_old = [
        f"{requirement} but constraints.txt has {pin}"
        for requirement in declared
        for pin in [pinned[canonicalize_name(requirement.name)]]
        if not requirement.specifier.contains(str(pin.specifier).removeprefix("=="))
    ]
    assert not too_old


def test_frameworks_have_pins_of_their_own_for_what_only_they_need() -> None:
    shared, own = pins("constraints.txt"), pins("tests/frameworks/constraints.txt")
    assert not shared.keys() & own.keys()
    project = tomllib.loads((workspace.ROOT / "pyproject.toml").read_text("utf-8"))
    declared = [Requirement(text) for text in project["dependency-groups"]["frameworks"]]
    for requirement in declared:
        pin = (own | shared)[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(str(pin.specifier).removeprefix("==")), requirement


@each_distribution
def test_plugins_are_locked_to_the_minor_version_of_core(
    distribution: workspace.Distribution,
) -> None:
    if distribution.name == "drivetrain":
        return
    wanted = [r for r in distribution.requirements if canonicalize_name(r.name) == "drivetrain"]
    version = Version(drivetrain.__version__)
    assert len(wanted) == 1
    assert wanted[0].specifier.contains(str(version))
    assert not wanted[0].specifier.contains(f"{version.major}.{version.minor + 1}.0")


@each_distribution
def test_every_distribution_has_a_readme_types_and_tests(
    distribution: workspace.Distribution,
) -> None:
    folder: Path = distribution.folder
    assert (folder / "README.md").is_file()
    assert list((folder / "tests").glob("test_*.py"))
    assert distribution.packages
    for package in distribution.packages:
        assert (folder / "src" / package / "py.typed").is_file()


def test_core_has_an_extra_for_every_other_distribution_of_its_name() -> None:
    # The drop-in is on no public index, where its name belongs to another package.
    with (workspace.ROOT / "core" / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert extras == {
        d.name.removeprefix("drivetrain-"): [f"{d.name}>=0.1.0,<0.2"]
        for d in DISTRIBUTIONS
        if d.name.startswith("drivetrain-")
    }
