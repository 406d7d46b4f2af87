"""A worker that starts again loads the adapters that can be loaded, and says which cannot."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from drivetrain_server.workers.loading import load_adapters

from drivetrain.errors import ConfigError


class Loaded(dict):
    def load(self, name, path):
        if path == "bad":
            raise ConfigError(f"{name} is damaged")
        self[name] = path


def test_one_that_is_damaged_ends_the_first_start_and_no_other():
    engine = SimpleNamespace(adapters=Loaded())
    order = {"adapters": {"a": "1", "b": "bad", "c": "2"}, "strict": False}
    assert load_adapters(engine, order) == {"b": "b is damaged"}
    assert engine.adapters == {"a": "1", "c": "2"}
    with pytest.raises(ConfigError, match="b is damaged"):
        load_adapters(engine, {**order, "strict": True})
