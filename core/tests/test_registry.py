"""What exists: read as metadata, chosen by name, loaded one at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import drivetrain
from drivetrain.contracts import Plugin, Section
from drivetrain.errors import ConfigError, PluginError
from drivetrain.plan import known
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import CORE, Entry, Registry, core_entries

Install = Callable[..., None]

PLUGIN = """
from drivetrain.contracts import Plugin, Problem, Section, hookimpl

class Colour(Section):
    shade: int = 1

class Paint(Plugin):
    name = "paint"
    sections = {"paint": Colour}

    @hookimpl
    def configure(self, plan):
        return [Problem("paint.shade", f"refused by {__name__}")]

def rule(params, job):
    return ("rule", params)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution as pip would: a module and a dist-info folder on ``sys.path``."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def installed(
        distribution: str,
        module: str,
        code: str = PLUGIN,
        entry_points: str = "",
        requires: str = "drivetrain<2",
        version: str = "1.2",
    ) -> None:
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
            f"Requires-Dist: torch\nRequires-Dist: {requires}\n"
        )
        points = entry_points or f"[drivetrain.plugins]\npaint = {module}:Paint\n"
        (info / "entry_points.txt").write_text(points)
        monkeypatch.delitem(sys.modules, module, raising=False)
        # As in a fresh process: what was read before this installation is forgotten.
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / module)])

    return installed


def test_installed_entries_are_read_without_importing_them(install: Install) -> None:
    install("acme-paint", "acme_paint")
    entry = Registry.installed().find("plugins", "paint")
    assert entry is not None
    assert (entry.distribution, entry.version, entry.value) == (
        "acme-paint",
        "1.2",
        "acme_paint:Paint",
    )
    assert "acme_paint" not in sys.modules
    assert entry.load().name == "paint"


def test_an_installed_plugin_takes_part_in_a_plan_that_names_it(install: Install) -> None:
    install("acme-paint", "acme_paint")
    with pytest.raises(ConfigError, match=r"^paint.shade: refused by acme_paint$"):
        Plan.build({"train_batch_size": 1, "paint": {"shade": 2}})
    sys.modules.pop("acme_paint")
    Plan.build({"train_batch_size": 1})
    assert "acme_paint" not in sys.modules


def test_entries_are_sorted_by_name_and_distribution(install: Install) -> None:
    points = "[drivetrain.kernels]\nb = x\na = x\n"
    install("zeta", "zeta", "", points)
    install("alpha", "alpha", "", points)
    found = [(e.name, e.distribution) for e in Registry.installed().entries("kernels")]
    ours = [pair for pair in found if pair[1] in ("alpha", "zeta")]
    assert ours == [("a", "alpha"), ("a", "zeta"), ("b", "alpha"), ("b", "zeta")]
    assert found == sorted(found)


def test_two_distributions_that_claim_one_name_are_refused_until_the_config_chooses(
    install: Install,
) -> None:
    install("acme-paint", "acme_paint")
    install("other-paint", "other_paint", version="9")
    config = {"train_batch_size": 1, "paint": {}}
    with pytest.raises(ConfigError) as caught:
        Plan.build(config)
    assert str(caught.value) == (
        "paint: plugin 'paint' (acme-paint 1.2) and plugin 'paint' (other-paint 9) claim the same "
        'name; choose one in the config, "plugins": {"paint": "acme-paint"}, or uninstall the other'
    )
    with pytest.raises(ConfigError, match="refused by other_paint"):
        Plan.build({**config, "plugins": {"paint": "other-paint"}})
    with pytest.raises(ConfigError, match=r"plugins.paint: 'nobody' does not offer paint"):
        Plan.build({**config, "plugins": {"paint": "nobody"}})


def test_optimizers_are_chosen_by_group_and_name(install: Install) -> None:
    points = "[drivetrain.optimizers]\nSpecial = {0}:rule\n"
    install("acme-rules", "acme_rules", entry_points=points.format("acme_rules"))
    install("other-rules", "other_rules", entry_points=points.format("other_rules"))
    with pytest.raises(PluginError, match=r'"optimizers.Special": "acme-rules"'):
        Registry.installed().find("optimizers", "Special")
    chosen = Registry.installed().choosing({"optimizers.Special": "other-rules"})
    assert chosen.load("optimizers", "Special").__module__ == "other_rules"


def test_cores_own_optimizer_makes_way_for_an_installed_one() -> None:
    acme = Entry("optimizers", "adamW", "acme-rules", "1", "acme_rules:rule")
    other = Entry("optimizers", "AdamW", "other-rules", "1", "other_rules:rule")
    assert Registry([*core_entries(), acme]).find("optimizers", "AdamW") is acme
    with pytest.raises(PluginError, match=r"other-rules 1.* and .*acme-rules 1.* claim the same"):
        Registry([*core_entries(), acme, other]).find("optimizers", "AdamW")
    with pytest.raises(PluginError, match="claim the same name"):
        Registry([*core_entries(), Entry("schedulers", "OneCycle", "acme-rules", "1", "x:y")]).find(
            "schedulers", "OneCycle"
        )


def test_optimizer_names_compare_case_insensitively_but_config_paths_do_not(
    install: Install,
) -> None:
    points = "[drivetrain.optimizers]\nSpecial = m:rule\n[drivetrain.plugins]\npaint = m:Paint\n"
    install("acme", "m", entry_points=points)
    registry = Registry.installed()
    assert registry.find("optimizers", "sPECIAL") is not None
    assert registry.find("plugins", "Paint") is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x = 1", "AttributeError: module 'broken' has no attribute 'Paint'"),
        ("def (", "SyntaxError: "),
    ],
)
def test_a_plugin_that_does_not_load_is_named_with_the_switch_that_disables_it(
    install: Install, code: str, reason: str
) -> None:
    install("acme-paint", "broken", code)
    with pytest.raises(PluginError) as caught:
        Plan.build({"train_batch_size": 1, "paint": {}})
    message = str(caught.value)
    assert message.startswith(
        "plugin 'paint' (acme-paint 1.2) could not be loaded from 'broken:Paint': " + reason
    )
    assert message.endswith("to run without it, set DRIVETRAIN_DISABLE_PLUGINS=paint")
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("requires", "fits"),
    [
        ("drivetrain<1", True),
        ("Drivetrain>=0.1,<0.2", True),
        ("drivetrain>=5", False),
        ("drivetrain==0.0.1", False),
        ('drivetrain>=5; python_version < "3"', True),
        ('drivetrain>=5; extra == "all"', True),
        ("drivetrain-zero>=5", True),
    ],
)
def test_a_plugin_built_for_another_core_is_refused(
    install: Install, requires: str, fits: bool
) -> None:
    install("acme-paint", "acme_paint", requires=requires)
    entry = Registry.installed().find("plugins", "paint")
    assert entry is not None
    if fits:
        assert entry.load().name == "paint"
    else:
        with pytest.raises(PluginError) as caught:
            entry.load()
        assert str(caught.value).startswith(
            f"plugin 'paint' (acme-paint 1.2) needs {requires}, "
            f"but drivetrain {drivetrain.__version__} is running"
        )
        assert "acme_paint" not in sys.modules


def test_a_plugin_built_for_other_hook_specifications_is_refused(install: Install) -> None:
    code = PLUGIN.replace('name = "paint"', 'name = "paint"\n    hookspec_version = 99')
    install("acme-paint", "acme_paint", code)
    with pytest.raises(PluginError, match=r"'paint' \(acme-paint 1.2\) is built for version 99 of"):
        Registry.installed().load("plugins", "paint")


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("DRIVETRAIN_DISABLE_PLUGINS", "x, paint", "switched off by DRIVETRAIN_DISABLE_PLUGINS"),
        ("DRIVETRAIN_DISABLE_PLUGINS", "ACME-paint", "switched off by DRIVETRAIN_DISABLE_PLUGINS"),
        ("DRIVETRAIN_PLUGINS", "other", "not in DRIVETRAIN_PLUGINS"),
    ],
)
def test_a_plugin_that_is_switched_off_says_so_when_a_config_needs_it(
    install: Install, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    install("acme-paint", "acme_paint")
    monkeypatch.setenv(variable, value)
    expected = f"paint: served by acme-paint, which is {reason}"
    with pytest.raises(ConfigError) as caught:
        Plan.build({"train_batch_size": 1, "paint": {}})
    assert caught.value.problems == [expected]
    with pytest.raises(PluginError, match=reason):
        Registry.installed().load("plugins", "paint")


@pytest.mark.parametrize("value", ["paint", "acme-paint", " other , paint"])
def test_the_allow_list_takes_names_and_distributions_and_never_hides_core(
    install: Install, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    install("acme-paint", "acme_paint")
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", value)
    registry = Registry.installed()
    assert registry.find("plugins", "paint") is not None
    assert registry.find("plugins", "fp16") is not None


class Toy(Plugin):
    name = "toy"
    sections = {"toy": Section}


def test_objects_added_to_one_registry_are_in_no_other() -> None:
    registry = Registry(core_entries())
    extended = registry.with_plugins(Toy)
    assert extended.load("plugins", "toy") is Toy
    assert registry.find("plugins", "toy") is None
    assert Registry.installed().find("plugins", "toy") is None


def test_an_added_object_goes_before_an_installed_one(install: Install) -> None:
    install("acme-paint", "acme_paint")
    registry = Registry.installed()
    registry.add("plugins", "paint", Toy)
    assert registry.load("plugins", "paint") is Toy
    with pytest.raises(PluginError, match=r"'paint' \(test_registry in-process\) and plugin"):
        registry.add("plugins", "paint", SimpleNamespace())


def test_any_object_can_be_added_under_any_group() -> None:
    registry = Registry(core_entries())
    factory = lambda params, job: (params, job)  # noqa: E731
    registry.add("optimizers", "Mine", factory)
    assert registry.load("optimizers", "mine") is factory


def test_a_name_that_nobody_serves_is_refused_with_a_suggestion() -> None:
    with pytest.raises(PluginError, match=r"no plugin is named 'fp61'; did you mean 'fp16'\?"):
        Registry(core_entries()).load("plugins", "fp61")


def test_cores_own_plugins_are_entries_like_any_other() -> None:
    entry = Registry.installed().find("plugins", "fp16")
    assert entry is not None
    assert (entry.distribution, entry.version) == (CORE, drivetrain.__version__)
    assert "fp16" in entry.load().sections


def test_every_path_of_cores_own_plugins_is_an_entry_and_the_other_way_round() -> None:
    served = {e.name: e.load() for e in core_entries() if e.group == "plugins"}
    assert all(path in plugin.sections for path, plugin in served.items())
    assert {path for plugin in served.values() for path in plugin.sections} == set(served)


def test_known_torch_classes_are_those_that_torch_has() -> None:
    import torch

    def subclasses(module: object, base: type) -> set[str]:
        found = {n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, base)}
        return {name for name in found - {base.__name__} if not name.startswith("_")}

    scheduler = torch.optim.lr_scheduler
    assert set(known.TORCH_OPTIMIZERS) == subclasses(torch.optim, torch.optim.Optimizer)
    assert set(known.TORCH_SCHEDULERS) == subclasses(scheduler, scheduler.LRScheduler)
