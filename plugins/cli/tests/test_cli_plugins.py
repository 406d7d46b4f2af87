"""``drivetrain plugins``, ``report`` and ``test-plugin``."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner, Result

from drivetrain import __version__
from drivetrain.cli import main
from drivetrain.contracts import Accelerator, Float, Plugin, PositiveInt, Scalar, Section, hookimpl
from drivetrain.errors import PluginError
from drivetrain.plan.known import PLANNED
from drivetrain.plan.registry import CORE, Entry, Registry


class GoodSection(Section):
    enabled: bool = False
    every: PositiveInt = 1


class Good(Plugin):
    name = "good"
    sections = {"good": GoodSection}

    @hookimpl
    def report_rows(self):
        return [("good things", "42")]


class Careless(Plugin):
    """Its sections refuse nothing, which the kit must notice."""

    class Loose(Section):
        model_config = {**Section.model_config, "extra": "ignore"}

    name = "careless"
    sections = {"careless": Loose}


class ShareValue(Scalar[Float]):
    """Has a name, so that it pickles."""


class Share(Plugin):
    """Its section is a single value."""

    name = "good_share"
    sections = {"good_share": ShareValue}


def spare_parts():
    return [("wheels", "4")]


def no_parts():
    raise PluginError("the shelf is empty")


class Absent(Accelerator):
    name = "absent"
    device_type = "absent"

    def probe(self) -> str | None:
        return "no such device on this machine"

    def communication_backend(self) -> str:
        return "gloo"


class Hasty(Absent):
    name = "hasty"

    def probe(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What seems to be installed: core, two plugins, one that does not load, an accelerator."""
    ours = (CORE, "drivetrain-cli")
    core = [entry for entry in Registry.installed()._entries if entry.distribution in ours]
    others = [
        Entry("plugins", "good", "drivetrain-good", "0.2", f"{__name__}:Good"),
        Entry("plugins", "careless", "drivetrain-careless", "0.2", f"{__name__}:Careless"),
        Entry("plugins", "good_share", "drivetrain-share", "0.2", f"{__name__}:Share"),
        Entry("plugins", "broken", "drivetrain-broken", "0.3", "no_such_module:Plugin"),
        Entry("accelerators", "absent", "drivetrain-absent", "0.2", f"{__name__}:Absent"),
        Entry("accelerators", "hasty", "drivetrain-hasty", "0.2", f"{__name__}:Hasty"),
        Entry("reports", "spare parts", "drivetrain-parts", "0.2", f"{__name__}:spare_parts"),
        Entry("reports", "other parts", "drivetrain-parts", "0.2", f"{__name__}:no_parts"),
    ]
    everything = Registry([*core, *others])
    monkeypatch.setattr(Registry, "installed", classmethod(lambda cls: everything))
    monkeypatch.setenv("COLUMNS", "600")


def drivetrain(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def cells(text: str, start: str) -> list[str]:
    row = next(line for line in text.splitlines() if start in line)
    return [cell.strip() for cell in row.strip("│ ").split("│")]


# -- plugins -----------------------------------------------------------------------------------


def test_a_plugin_is_listed_with_its_hooks() -> None:
    row = cells(drivetrain("plugins").stdout, "│ good")
    assert row[:2] == ["plugin", "good"]
    assert row[3] == "report_rows"


@pytest.mark.parametrize("columns", [None, "60"])
def test_no_name_is_cut_where_the_list_is_piped(monkeypatch, columns: str | None) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    text = drivetrain("plugins").stdout
    assert "…" not in text
    if columns is None:
        assert "train_micro_batch_size_per_gpu" in text


def test_a_plugin_that_does_not_load_is_listed_with_the_reason() -> None:
    result = drivetrain("plugins")
    assert result.exit_code == 0
    row = cells(result.stdout, "│ broken")
    assert row[2] == "drivetrain-broken 0.3"
    assert "No module named 'no_such_module'" in row[3]
    assert "DRIVETRAIN_DISABLE_PLUGINS=broken" in row[3]


def test_the_list_is_there_for_programs_too() -> None:
    rows = json.loads(drivetrain("plugins", "--json").stdout)
    batch = next(row for row in rows if "train_batch_size" in row["names"])
    assert batch["distribution"] == "drivetrain"
    assert batch["version"] == __version__
    assert "plan_batch" in batch["hooks"]
    assert batch["problem"] is None


# -- report ------------------------------------------------------------------------------------


def test_the_report_shows_versions_of_everything_below() -> None:
    import torch

    text = drivetrain("report").stdout
    assert cells(text, "│ Drivetrain ")[1] == __version__
    assert cells(text, "│ Python ")[1].startswith(".".join(map(str, sys.version_info[:3])))
    assert cells(text, "│ version ")[1] == torch.__version__


def test_the_report_says_why_an_accelerator_cannot_be_used() -> None:
    row = cells(drivetrain("report").stdout, "│ absent")
    assert row[1] == "not usable: no such device on this machine"


def test_the_report_has_what_plugins_say_of_themselves() -> None:
    assert cells(drivetrain("report").stdout, "│ good things")[1] == "42"


def test_the_report_has_tables_of_other_packages() -> None:
    text = drivetrain("report").stdout
    assert "\nspare parts" in text
    assert cells(text, "│ wheels")[1] == "4"
    assert cells(text, "│ report 'other parts'")[1] == "the shelf is empty"


def test_the_report_says_which_accelerator_a_job_would_get(monkeypatch) -> None:
    assert cells(drivetrain("report").stdout, "│ in use")[1] == "cpu"
    monkeypatch.setenv("DRIVETRAIN_ACCELERATOR", "absent")
    row = cells(drivetrain("report").stdout, "│ in use")
    assert row[1].startswith("the environment variable DRIVETRAIN_ACCELERATOR asks for 'absent'")


def test_the_cpu_is_usable_without_a_package_of_its_own() -> None:
    text = drivetrain("report").stdout
    assert cells(text, "│ cpu (drivetrain ")[1].startswith("usable, with plain torch;")
    assert text.count("pip install drivetrain-cpu") == 1


def test_the_report_survives_a_plugin_that_does_not_load() -> None:
    result = drivetrain("report")
    assert result.exit_code == 0
    assert "No module named 'no_such_module'" in result.stdout


def test_the_report_says_how_to_get_what_is_missing() -> None:
    row = cells(drivetrain("report").stdout, "pip install drivetrain-onebit")
    assert row[0] == "OneBitAdam, OneBitLamb, ZeroOneAdam"


def test_the_report_sends_nobody_for_packages_that_do_not_exist() -> None:
    assert not PLANNED & set(drivetrain("report").stdout.split())


# -- test-plugin -------------------------------------------------------------------------------


def test_a_sound_plugin_passes_every_check() -> None:
    result = drivetrain("test-plugin", "good")
    assert result.exit_code == 0, result.output
    assert cells(result.stdout, "unknown key is refused")[1] == "passed"
    assert "AssertionError" not in result.stdout


def test_a_plugin_that_ignores_unknown_keys_fails_that_check() -> None:
    result = drivetrain("test-plugin", "careless")
    assert result.exit_code == 2
    assert cells(result.stdout, "unknown key is refused")[1] != "passed"
    assert cells(result.stdout, "the plugin pickles")[1] == "passed"
    assert "1 of 8 checks failed for 'careless'" in result.stderr


def test_a_plugin_that_is_not_installed_is_refused_with_a_suggestion() -> None:
    result = drivetrain("test-plugin", "goood")
    assert result.exit_code == 2
    assert "did you mean 'good'?" in result.stderr


def test_an_accelerator_is_tested_too_and_skips_what_needs_its_device() -> None:
    result = drivetrain("test-plugin", "absent")
    assert result.exit_code == 0, result.output
    assert cells(result.stdout, "│ the probe answers")[1] == "passed"
    row = cells(result.stdout, "│ the device is present")
    assert row[1] == "skipped: absent cannot be used here: no such device on this machine"


def test_an_accelerator_that_fails_a_check_is_told_what_to_do() -> None:
    from drivetrain.testing import AcceleratorConformance  # which imports torch, as Hasty must not

    result = drivetrain("test-plugin", "hasty")
    assert result.exit_code == 2
    row = cells(result.stdout, "│ the probe answers")
    assert row[1].endswith("found True; return None where the device can be used")
    assert f"1 of {len(AcceleratorConformance.checks())} checks failed" in result.stderr


def test_a_single_value_must_be_given() -> None:
    result = drivetrain("test-plugin", "good_share")
    assert "give one: --set good_share=VALUE" in result.stderr
    result = drivetrain("test-plugin", "good_share", "--set", "good_share=0.5")
    assert result.exit_code == 0, result.output
