"""Where DeepSpeed's names lead: to an object, to a package, or to advice."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from importlib import import_module

import deepspeed
import pytest
from deepspeed._surface import beside, lookup, modules
from deepspeed._surface.names import INSTEAD, SAME

from drivetrain.plan.registry import Registry

NAMES = [(name, *lookup.status(name)) for name in lookup.everything()]
WORKING = [name for name, status, _ in NAMES if status == "works"]


def read(dotted):
    module, _, name = f"deepspeed.{dotted}".rpartition(".")
    return getattr(import_module(module), name)


def test_every_name_that_works_leads_to_an_object():
    assert len(WORKING) > 150
    without = [name for name in WORKING if read(name) is None]
    assert without == ["runtime.constants.LOG_LEVEL_DEFAULT"]  # a default that leaves it open


def test_every_other_name_says_what_to_do():
    for name, status, text in NAMES:
        if status == "works":
            continue
        with pytest.raises(AttributeError) as caught:
            read(name)
        expected = f"needs {text}, which is not " if status == "needs" else text
        assert expected in str(caught.value), name
        assert status in ("needs", "not yet")


def test_the_table_of_packages_agrees_with_what_they_declare():
    entries = Registry.installed().entries("deepspeed")
    declared = {e.name: e.distribution for e in entries}
    listed = lookup._needs()
    assert {name: listed.get(name) for name in declared} == declared
    # Packages on which this one does not depend are not always here.
    here = set(declared.values())
    assert {name for name, package in listed.items() if package in here} == set(declared)


def test_no_name_is_declared_twice():
    assert not set(lookup._own()) & set(lookup._needs())
    assert not set(SAME) & {*lookup._own(), *lookup._needs()}
    assert not set(INSTEAD) & {*lookup._own(), *lookup._needs(), *SAME}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("zero.Init", "runtime.zero.partition_parameters.Init"),
        ("DeepSpeedEngine", "runtime.engine.DeepSpeedEngine"),
        ("utils.safe_get_full_grad", "utils.tensor_fragment.safe_get_full_grad"),
        ("ops.adam.FusedAdam", "ops.adam.fused_adam.FusedAdam"),
        ("checkpointing.checkpoint", "runtime.activation_checkpointing.checkpointing.checkpoint"),
        ("comm.all_reduce", "comm.comm.all_reduce"),
    ],
)
def test_a_name_is_the_same_object_in_every_module_that_shows_it(one, other):
    assert read(one) is read(other)


def test_imports_that_fail_say_why():
    with pytest.raises(
        ImportError, match=r"DeepSpeedHybridEngine needs drivetrain-hybrid-engine, which"
    ):
        from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine  # noqa: F401
    with pytest.raises(ImportError, match="has no name 'FusedAdamm'; did you mean 'FusedAdam'"):
        from deepspeed.ops.adam import FusedAdamm  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="Drivetrain's deepspeed has no name 'nothing'"):
        import_module("deepspeed.nothing")
    assert not hasattr(deepspeed, "nothing")
    assert not hasattr(deepspeed.zero, "nothing")


def test_modules_without_names_of_their_own_are_modules():
    import deepspeed.runtime
    import deepspeed.sequence.layer

    assert deepspeed.sequence.layer.__name__ == "deepspeed.sequence.layer"
    assert "zero" in dir(deepspeed.runtime)
    assert "Init" in dir(deepspeed.zero)


def test_a_name_whose_package_is_switched_off_says_what_to_install():
    code = (
        "import deepspeed\ntry:\n    deepspeed.zero.Init\nexcept AttributeError as e:\n    print(e)"
    )
    done = python(code, DRIVETRAIN_DISABLE_PLUGINS="drivetrain-zero")
    assert "needs drivetrain-zero, which is switched off by DRIVETRAIN_DISABLE_PLUGINS" in done


def test_importing_costs_no_more_than_importing_drivetrain():
    code = "import {}, sys, json; print(json.dumps(sorted(sys.modules)))"
    ours = set(json.loads(python(code.format("deepspeed"))))
    base = set(json.loads(python(code.format("drivetrain"))))
    assert {name for name in ours - base if not name.startswith("deepspeed")} == set()
    assert len(ours - base) <= 4


def test_files_of_deepspeed_in_the_same_folder_are_refused(tmp_path):
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "__init__.py").touch()
    with pytest.raises(ImportError, match=r"holds files of DeepSpeed \(runtime\) beside"):
        beside.check([str(tmp_path)], [])


def test_another_installation_is_named(tmp_path):
    other = tmp_path / "deepspeed"
    other.mkdir()
    (other / "__init__.py").touch()
    with pytest.warns(RuntimeWarning, match=f"another deepspeed in {other}"):
        beside.check(deepspeed.__path__, [str(tmp_path)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        beside.check([str(other)], [str(tmp_path), str(tmp_path / "nothing")])


def test_the_finder_is_installed_once():
    modules.install()
    assert sum(type(finder).__name__ == "_Finder" for finder in sys.meta_path) == 1


def python(code, **env):
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
