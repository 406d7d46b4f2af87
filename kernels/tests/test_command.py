"""``drivetrain build`` compiles ahead of time and says what failed."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from drivetrain_kernels import Provider
from drivetrain_kernels import command as command_module
from drivetrain_kernels.native import NativeLibrary
from drivetrain_kernels.registry import registry

from drivetrain.cli import main


@pytest.fixture
def acme(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(tmp_path / "cache"))
    made = Provider("acme", "1.0", "cpu")
    for name in ("used", "spare"):
        source = tmp_path / f"{name}.cpp"
        source.write_text('extern "C" int answer() { return 1; }\n')
        library = NativeLibrary(f"acme_{name}", [source], flags=["-fPIC"])
        if name == "used":
            made.implement_native("adam", library, lambda loaded: loaded.answer)
        made.also_builds([library])
    monkeypatch.setattr(command_module, "served_device_types", lambda: ["cpu"])
    monkeypatch.setattr(registry, "providers", lambda device_type: [made])
    return tmp_path


def test_build_makes_what_this_machine_uses(acme):
    result = CliRunner().invoke(command_module.build, [])
    assert result.exit_code == 0, result.output
    assert "acme 1.0: acme_used: built acme_used" in result.output
    assert "acme_spare" not in result.output


def test_build_makes_what_is_used_for_no_op(acme):
    made = registry.providers("cpu")[0]
    made.uses(next(each for each in made.libraries if each.name == "acme_spare"))
    result = CliRunner().invoke(command_module.build, [])
    assert "acme 1.0: acme_used: built acme_used" in result.output
    assert "acme 1.0: acme_spare: built acme_spare" in result.output


def test_build_all_makes_every_variant_and_ships_it(acme):
    output = acme / "prebuilt"
    result = CliRunner().invoke(command_module.build, ["--all", "--output", str(output)])
    assert result.exit_code == 0, result.output
    shipped = sorted(path.name.rpartition("-")[0] for path in output.iterdir())
    assert shipped == ["acme_spare", "acme_used"]


def test_build_fails_by_name_and_builds_the_rest(acme):
    (acme / "used.cpp").write_text("broken\n")
    result = CliRunner().invoke(command_module.build, ["--all"])
    assert result.exit_code == 1
    assert "acme 1.0: acme_used: cannot build acme_used" in result.output
    assert "acme_spare: built" in result.output


@pytest.mark.parametrize("folder", ["/proc/x", "/dev/null/x"])
def test_a_folder_that_cannot_be_made_is_one_message(folder: str) -> None:
    result = CliRunner().invoke(main, ["build", "--output", folder])
    assert result.exit_code == 2
    assert result.output.startswith(f"error: --output {folder} cannot be made: ")
    assert len(result.output.splitlines()) == 1
