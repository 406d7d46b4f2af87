"""What the test environments rest on: the workspace as read, and the torch that they share."""

from __future__ import annotations

import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tools import torch_layer, workspace


def package(root: Path, folder: str, name: str, text: str) -> None:
    path = root / folder / "pyproject.toml"
    path.parent.mkdir(parents=True)
    path.write_text(f'[project]\nname = "{name}"\n{text}')


@pytest.fixture
def packages(tmp_path: Path) -> dict[str, workspace.Distribution]:
    package(tmp_path, "core", "drivetrain", 'dependencies = ["torch>=2", "click"]\n')
    package(
        tmp_path,
        "plugins/zero",
        "drivetrain-zero",
        'dependencies = ["Drivetrain>=0.1"]\n'
        'optional-dependencies.fast = ["drivetrain_offload", "lz4"]\n'
        'entry-points."drivetrain.plugins".zero_optimization = "a:b"\n',
    )
    package(
        tmp_path,
        "plugins/monitors/offload",
        "drivetrain_offload",
        'dependencies = ["drivetrain", "psutil>5"]\n[dependency-groups]\ntest = ["numpy"]\n',
    )
    return workspace.load(tmp_path)


def needs(packages: dict[str, workspace.Distribution], *names: str) -> list[str]:
    return [str(r) for r in workspace.external_requirements(names, packages)]


def test_every_folder_with_a_project_is_a_distribution(packages) -> None:
    assert list(packages) == ["drivetrain", "drivetrain-zero", "drivetrain-offload"]
    assert packages["drivetrain-zero"].entry_points == {
        "drivetrain.plugins": ("zero_optimization",)
    }


def test_environments_are_named_after_distributions(packages) -> None:
    assert [d.environment for d in packages.values()] == ["core", "zero", "offload"]


def test_a_distribution_brings_those_of_the_workspace_that_it_declares(packages) -> None:
    names = [d.name for d in workspace.closure(["drivetrain-zero"], packages)]
    assert names == ["drivetrain", "drivetrain-zero"]


def test_an_environment_gets_what_is_declared_and_nothing_else(packages) -> None:
    assert needs(packages, "drivetrain-zero") == ["click", "torch>=2"]


def test_test_groups_count_for_the_distribution_under_test_alone(packages) -> None:
    assert needs(packages, "drivetrain-offload") == ["click", "numpy", "psutil>5", "torch>=2"]


def test_environments_of_all_distributions_leave_out_what_their_own_tests_need(packages) -> None:
    found = workspace.external_requirements(packages, packages, tests=False)
    assert [str(r) for r in found] == ["click", "psutil>5", "torch>=2"]


def test_extras_that_another_distribution_asks_for_count(packages, tmp_path) -> None:
    package(tmp_path, "plugins/all", "drivetrain-all", 'dependencies = ["drivetrain-zero[fast]"]\n')
    again = workspace.load(tmp_path)
    assert needs(again, "drivetrain-all") == ["click", "lz4", "psutil>5", "torch>=2"]
    names = {d.name for d in workspace.closure(["drivetrain-all"], again)}
    assert names == set(again)


def test_the_shared_layer_holds_torch_and_what_torch_declares(tmp_path: Path) -> None:
    layer = torch_layer.build(tmp_path)
    names = {path.name for path in layer.iterdir()}
    assert {"torch", "sympy", "typing_extensions.py"} <= names
    assert any(name.startswith("torch-") and name.endswith(".dist-info") for name in names)
    for absent in ("pytest", "drivetrain", "numpy", "pydantic"):
        assert absent not in names
    assert all(path.is_symlink() and path.exists() for path in layer.iterdir())


def test_the_layer_is_made_once_even_by_several_at_a_time(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        layers = set(pool.map(lambda _: torch_layer.build(tmp_path), range(8)))
    assert len(layers) == 1
    assert [path for path in tmp_path.iterdir() if path not in layers] == []


def test_an_environment_with_the_layer_sees_torch_installed_and_nothing_else(tmp_path) -> None:
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    site_packages = next((tmp_path / "env").glob("lib/python*/site-packages"))
    torch_layer.attach(torch_layer.build(tmp_path / "layers"), site_packages)
    code = (
        "from importlib.metadata import distributions, version; import importlib.util as u; "
        "print(version('torch')); print(*(u.find_spec(n) is not None for n in "
        "('torch', 'pytest', 'pydantic', 'drivetrain')))"
    )
    python = tmp_path / "env" / "bin" / "python"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [distribution("torch").version, "True", "False", "False", "False"]


def test_without_torch_the_layer_says_how_to_get_it(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(workspace.ROOT)!r})\n"
        "import importlib.metadata as m\n"
        "from pathlib import Path\n"
        "from tools import torch_layer\n"
        "def absent(name): raise m.PackageNotFoundError(name)\n"
        "torch_layer.distribution = absent\n"
        f"torch_layer.build(Path({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch is not installed next to the interpreter that runs tox" in done.stderr
    assert "run: make setup" in done.stderr
