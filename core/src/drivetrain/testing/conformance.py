"""What every plugin must hold to, as a class of tests that a plugin's own tests inherit."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from drivetrain.contracts.plugin.plugin import Plugin
from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry


class PluginConformance:
    """Inherit this in a test module and say what the plugin is.

    ::

        class TestMyPlugin(PluginConformance):
            plugin = MyPlugin
            config = {"my_section": {"every": 10}}

    Class attributes:
        plugin: the plugin's class.
        config: the plugin's own part of a config that switches it on.
        rest: what else the plugin needs of a config.
    """

    plugin: ClassVar[type[Plugin]]
    config: ClassVar[Mapping[str, Any]]
    rest: ClassVar[Mapping[str, Any]] = {"train_batch_size": 1}

    def test_the_module_imports_without_torch(self) -> None:
        """A config can be checked where torch is not even loaded."""
        module = self.plugin.__module__
        after = imported_with(module)
        assert "torch" not in after, f"importing {module} imports torch; do so inside functions"

    def test_importing_has_no_side_effects(self) -> None:
        """Importing changes neither environment nor logging nor import hooks."""
        script = (
            "import json, logging, os, sys, warnings\n"
            "import drivetrain.contracts.plugin.plugin\n"
            "def state(): return repr((sorted(os.environ.items()), logging.root.handlers,"
            " logging.root.level, sys.meta_path, sys.excepthook, os.getcwd(), warnings.filters))\n"
            "before = state()\n"
            f"import {self.plugin.__module__}\n"
            "print(json.dumps([before, state()]))"
        )
        before, after = json.loads(run_python(script))
        assert before == after

    def test_sections_round_trip_through_json(self) -> None:
        """A section written as JSON reads back as itself."""
        for path, section in self._plugin()._sections.items():
            model = self.plugin.sections[path]
            assert model.model_validate_json(section.model_dump_json()) == section, path

    def test_defaults_are_valid(self) -> None:
        """Every section's defaults, where it has them, pass its own validation."""
        for path, model in self.plugin.sections.items():
            if all(not field.is_required() for field in model.model_fields.values()):
                assert model.model_validate(model().model_dump()) == model(), path

    def test_an_unknown_key_is_refused_by_its_path(self) -> None:
        """A misspelt key is never ignored."""
        for path in self._plugin()._sections:
            config = copy.deepcopy({**self.rest, **self.config})
            section = config
            for name in path.split("."):
                section = section[name]
            if isinstance(section, dict):
                section["no_such_key"] = 1
                assert f"{path}.no_such_key" in self._refusal(config)

    def test_the_order_of_the_config_does_not_matter(self) -> None:
        """A config means the same whichever way round it is written."""
        config = {**self.rest, **self.config}
        turned = dict(reversed(list(config.items())))
        one, other = self._plan(config), self._plan(turned)
        assert one.features() == other.features()
        assert one.explain().hooks == other.explain().hooks

    def test_the_plugin_pickles(self) -> None:
        """A plan can be sent to another process."""
        plugin = self._plugin()
        other = pickle.loads(pickle.dumps(plugin))  # noqa: S301 - it is our own
        assert other._sections == plugin._sections

    def test_the_class_says_what_it_is(self) -> None:
        """Name, sections, features and conflicts fit together."""
        plugin = self._plugin()
        assert plugin.name
        assert set(plugin.feature_values()) <= set(plugin.features())
        for conflict in plugin.conflicts():
            assert conflict.feature in plugin.features(), conflict
            assert conflict.reason, conflict

    def _plan(self, config: Mapping[str, Any]) -> Plan:
        return Plan.build(config, registry=Registry.installed().with_plugins(self.plugin))

    def _refusal(self, config: Mapping[str, Any]) -> str:
        """Why ``config`` is refused; empty when it is not."""
        try:
            self._plan(config)
        except ConfigError as error:
            return str(error)
        return ""

    def _plugin(self) -> Plugin:
        plan = self._plan({**self.rest, **self.config})
        return next(member.plugin for member in plan.members if type(member.plugin) is self.plugin)


def imported_with(module: str) -> set[str]:
    """Modules that are loaded after importing ``module`` in a new process."""
    script = f"import {module}, sys, json; print(json.dumps(list(sys.modules)))"
    return set(json.loads(run_python(script)))


def run_python(script: str) -> str:
    """What a script prints in a new process with this one's path."""
    path = f"import sys; sys.path[:] = {sys.path!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", path + script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
