"""An axis of several ranks needs somebody who has them share work."""

from __future__ import annotations

from typing import ClassVar

import pytest

from drivetrain.contracts import Bool, Plugin, Section, Sections
from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry, core_entries


class SequencesSection(Section):
    enabled: Bool = True


class Sequences(Plugin):
    name = "sequences"
    sections: ClassVar[Sections] = {"sequences": SequencesSection}
    serves_axes: ClassVar[frozenset[str]] = frozenset({"sp"})


def test_parts_of_sequences_that_no_plugin_computes_with_are_refused() -> None:
    config = {"train_batch_size": 2, "sequence_parallel_size": 2}
    for sections in ({}, {"sequences": {"enabled": False}}):
        with pytest.raises(ConfigError) as caught:
            Plan.build(
                {**config, **sections},
                world_size=2,
                registry=Registry(core_entries()).with_plugins(Sequences),
            )
        (problem,) = caught.value.problems
        assert problem.startswith("sequence_parallel_size: 2 ranks would share each sequence")
        assert "served by drivetrain-sequence" in problem
    for served in ({"sequences": {}}, {"sequence_parallel_size": 1}):
        Plan.build(
            {**config, **served},
            world_size=2,
            registry=Registry(core_entries()).with_plugins(Sequences),
        )
