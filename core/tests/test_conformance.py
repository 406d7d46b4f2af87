"""The conformance kit passes a sound plugin and catches one flaw each."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable

import pytest

from drivetrain.errors import DrivetrainError
from drivetrain.testing import PluginConformance

SOUND = """
    from typing import ClassVar

    from pydantic import BaseModel, ConfigDict, field_validator

    from drivetrain.contracts import Conflict, Plugin, Section, hookimpl


    class Sample(Section):
        every: int = 10


    class SamplePlugin(Plugin):
        name = "sample"
        sections: ClassVar = {"sample": Sample}

        def features(self):
            return {"sample.every": self.section(Sample).every}

        def feature_values(self):
            return {"sample.every": (1, 10)}

        @hookimpl
        def step_end(self, engine):
            pass
"""

CHECKS = [name for name in vars(PluginConformance) if name.startswith("test_")]

# check -> (what is replaced in the sound plugin, by what)
FLAWS = {
    "test_the_module_imports_without_torch": ("from typing", "import torch\n    from typing"),
    "test_importing_has_no_side_effects": (
        "from typing",
        "import logging\n    logging.basicConfig()\n    from typing",
    ),
    "test_sections_round_trip_through_json": (
        "every: int = 10",
        (
            "every: int = 10\n\n        @field_validator('every')\n        def _more(cls, value):\n"
            "            return value + 1"
        ),
    ),
    "test_defaults_are_valid": (
        "every: int = 10",
        "every: int = '10'",
    ),
    "test_an_unknown_key_is_refused_by_its_path": (
        "class Sample(Section):",
        "class Sample(BaseModel):\n        model_config = ConfigDict(frozen=True, extra='ignore')",
    ),
    "test_the_plugin_pickles": (
        "def features(self):",
        (
            "def __init__(self, sections):\n            super().__init__(sections)\n"
            "            self.callback = lambda: None\n\n        def features(self):"
        ),
    ),
    "test_the_class_says_what_it_is": ('return {"sample.every": (1, 10)}', 'return {"typo": (1,)}'),
    "test_the_order_of_the_config_does_not_matter": (
        "self.section(Sample).every}",
        "id(self)}",
    ),
}


@pytest.fixture
def kit(tmp_path, monkeypatch) -> Callable[[str], PluginConformance]:
    """Makes the kit of a plugin from the source of its module."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(source: str) -> PluginConformance:
        name = f"sample_{abs(hash(source))}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        module = importlib.import_module(name)

        class Kit(PluginConformance):
            plugin = module.SamplePlugin
            config = {"sample": {"every": 5}}

        return Kit()

    return make


@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_plugin_passes(kit, check):
    getattr(kit(SOUND), check)()


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("check", CHECKS)
def test_each_check_catches_its_flaw(kit, check):
    old, new = FLAWS[check]
    assert old in SOUND
    flawed = kit(SOUND.replace(old, new, 1))
    with pytest.raises((AssertionError, DrivetrainError, ValueError, AttributeError)):
        getattr(flawed, check)()
