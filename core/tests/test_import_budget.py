"""What importing costs: nothing heavy before it is needed."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import drivetrain

LIGHT = [
    "drivetrain.contracts.loop.batch",
    "drivetrain.plan.core_entries",
    "drivetrain.plan.config.arguments",
    "drivetrain.plan.config.composition",
    "drivetrain.plan.config.loading",
    "drivetrain.plan.config.strict_yaml",
    "drivetrain.errors",
    "drivetrain.contracts.plugin.hookspecs",
    "drivetrain.plan.hub",
    "drivetrain.plan.known",
    "drivetrain.plan.mesh_layout",
    "drivetrain.plan",
    "drivetrain.contracts.plugin.plugin",
    "drivetrain.plan.registry",
    "drivetrain.contracts.plugin.section",
]


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_by(statement: str) -> set[str]:
    """Top-level packages, and modules of ours, that ``statement`` leaves in ``sys.modules``."""
    names = python(f"import sys; {statement}; print(*sys.modules)").split()
    return {n if n.startswith("drivetrain") else n.partition(".")[0] for n in names}


def test_import_drivetrain_imports_nothing_but_itself() -> None:
    loaded = loaded_by("import drivetrain; drivetrain.__version__; dir(drivetrain)")
    assert not loaded & {"torch", "pydantic", "pluggy", "yaml", "click", "rich", "numpy"}
    own = {name for name in loaded if name.startswith("drivetrain")}
    assert own == {"drivetrain", "drivetrain.lazy", "drivetrain.version"}


def test_import_drivetrain_imports_no_plugin() -> None:
    assert not {n for n in loaded_by("import drivetrain") if n.startswith("drivetrain_")}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_no_torch(module: str) -> None:
    assert "torch" not in loaded_by(f"import {module}")


def test_a_whole_plan_is_built_and_explained_without_torch() -> None:
    loaded = loaded_by(
        "from drivetrain import Plan; "
        "Plan.build({'train_batch_size': 4, 'optimizer': {'type': 'AdamW'}}).explain()"
    )
    assert "drivetrain.plan" in loaded
    assert "torch" not in loaded
    assert "yaml" not in loaded


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'drivetrain' has no attribute 'enigne'"):
        drivetrain.enigne  # noqa: B018


def test_public_names_are_listed_before_they_are_imported() -> None:
    public = {"initialize", "init_distributed", "add_config_arguments", "Plan", "Job", "Engine"}
    public |= {"Plugin", "hookimpl", "whole", "units", "materialize", "errors", "__version__"}
    public |= {"attention"}
    assert set(drivetrain.__all__) == public
    assert public <= set(dir(drivetrain))


@pytest.mark.parametrize("name", sorted(set(drivetrain.__all__) - {"__version__", "errors"}))
def test_public_names_resolve_to_what_can_be_called(name: str) -> None:
    assert callable(getattr(drivetrain, name))


FACES = [
    *("drivetrain", "drivetrain.contracts", "drivetrain.plan", "drivetrain.job"),
    *("drivetrain.engine", "drivetrain.testing"),
]


@pytest.mark.parametrize("face", FACES)
def test_a_face_gives_every_name_that_it_lists_and_type_checkers_see(face: str) -> None:
    package = import_module(face)
    stub = Path(package.__file__ or "").with_suffix(".pyi").read_text("utf-8")
    seen = {alias.asname for node in ast.parse(stub).body for alias in getattr(node, "names", ())}
    assert sorted(seen) == sorted(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)


@pytest.mark.parametrize("face", FACES)
def test_no_name_of_a_face_is_that_of_a_module_beside_it(face: str) -> None:
    # the import system would bind the module to the name, whenever somebody imports it
    package = import_module(face)
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert set(package.__all__) & modules <= {"errors"}
