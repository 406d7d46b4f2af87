"""``schedule: fastest`` chooses by measured times and memory, before there is a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from drivetrain_pipeline.cutting import LayerFacts, cut
from drivetrain_pipeline.explain import rows
from drivetrain_pipeline.planning import micro_batches_of, settled
from drivetrain_pipeline.section import PipelineSection

from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan

NAMES = [f"layers.{number}" for number in range(8)]


def measured(path: Path, forward: list[float], activations: int = 10) -> str:
    path.write_text(
        json.dumps(
            {
                name: {"forward": time, "backward": 2 * time, "activations": activations}
                for name, time in zip(NAMES, forward, strict=True)
            }
        )
    )
    return str(path)


def plan(**section: Any) -> Plan:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 8,
        "pipeline": {"stages": 2, "schedule": "fastest", **section},
    }
    return Plan.build(config, world_size=2)


def chosen(**section: Any) -> PipelineSection:
    found = plan(**section)
    return settled(found.section(PipelineSection), micro_batches_of(found))


def test_equal_layers_make_a_v_shape() -> None:
    found = chosen()
    assert (found.schedule, found.chunks, found.partition) == ("zb_v", 2, "parameters")
    assert chosen(chunks=3).schedule == "interleaved"


def test_measured_times_choose_and_cut(tmp_path: Path) -> None:
    # One slow layer: only one chunk for each stage can be balanced, 7 | 1 + 1 + ... .
    file = measured(tmp_path / "times.json", [7, 1, 1, 1, 1, 1, 1, 1])
    found = chosen(measured=file)
    assert found.partition == "measured"
    layers = [LayerFacts(name, "Layer", 1) for name in NAMES]
    assert cut(layers, 2, "measured", found) == (0, 1, 8)
    assert found.chunks == 1
    assert found.schedule == "zb_h1"


def test_a_limit_of_memory_is_kept(tmp_path: Path) -> None:
    file = measured(tmp_path / "times.json", [1] * 8)
    # 4 layers of a stage keep 40 bytes for each micro-batch.
    assert chosen(measured=file, memory_limit=80).schedule in ("1f1b", "zb_h1", "zb_v")
    with pytest.raises(
        ConfigError, match=r"pipeline.schedule: .* within 79 of memory; .* least, 80"
    ):
        plan(measured=file, memory_limit=79)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, r"pipeline.measured: .*times.json cannot be read: .*No such file"),
        ("[1]", r"pipeline.measured: .* cannot be read"),
        ("{}", r"pipeline.measured: .* has no layers; measure again"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, reason: str) -> None:
    file = tmp_path / "times.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        plan(measured=str(file))


def test_a_limit_without_measured_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory_limit needs `measured`"):
        plan(memory_limit=100)


def test_the_choice_is_explained(tmp_path: Path) -> None:
    found = dict(rows(plan()))
    assert found["schedule"] == "zb_v (fastest by times of equal layers), 8 micro-batches"
    file = measured(tmp_path / "times.json", [7, 1, 1, 1, 1, 1, 1, 1])
    assert str(dict(rows(plan(measured=file)))["schedule"]).startswith("zb_h1 (fastest by measured")
