"""Tables of where bytes live, against numbers computed by hand."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_offload import MemoryRow, memory_table, memory_text
from drivetrain_offload.memory import note_memory
from drivetrain_offload.memory_report import report_memory

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.testing.models import mlp

COUNT = sum(p.numel() for p in mlp().parameters())


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.destroy()


def start(engines: list[Engine], **config: Any) -> Engine:
    module = mlp()
    given = {"train_batch_size": 2, "optimizer": {"type": "AdamW"}, "accelerator": "cpu", **config}
    engine, *_ = drivetrain.initialize(
        model=module, model_parameters=module.parameters(), config=given
    )
    engines.append(engine)
    return engine


def step(engine: Engine) -> None:
    engine.backward(engine(torch.ones(2, 8), torch.zeros(2, 8)))
    engine.step()


def by_kind(engine: Engine) -> dict[str, tuple[str, int]]:
    return {row.kind: (row.place, row.nbytes) for row in memory_table(engine) if row.kind != "step"}


def test_states_of_float32_take_16_bytes_a_parameter(engines: list[Engine]) -> None:
    assert by_kind(start(engines)) == dict.fromkeys(
        ["parameter", "gradient", "exp_avg", "exp_avg_sq"], ("device", 4 * COUNT)
    )


def test_states_of_bf16_take_16_bytes_a_parameter_too(engines: list[Engine]) -> None:
    sizes = {"parameter": 2, "gradient": 2, "master": 4, "exp_avg": 4, "exp_avg_sq": 4}
    found = by_kind(start(engines, bf16={"enabled": True}))
    assert found == {kind: ("device", size * COUNT) for kind, size in sizes.items()}


def test_offloaded_states_are_in_host_memory(engines: list[Engine]) -> None:
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    found = by_kind(start(engines, bf16={"enabled": True}, **offload))
    assert found["parameter"] == ("device", 2 * COUNT)
    assert found["master"] == found["exp_avg"] == found["exp_avg_sq"] == ("host", 4 * COUNT)


def test_states_in_files_leave_their_buffers_in_host_memory(
    engines: list[Engine], tmp_path: Path
) -> None:
    files = {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": 3, "buffer_size": 512}
    offload = {"zero_optimization": {"offload_optimizer": files}}
    found = by_kind(start(engines, bf16={"enabled": True}, **offload))
    assert found["master"] == found["exp_avg"] == found["exp_avg_sq"] == ("nvme", 4 * COUNT)
    # Three buffers for at least 512 elements of three states, and at most all elements.
    place, nbytes = found["buffers of tiles"]
    assert place == "host"
    assert 3 * 512 * 12 <= nbytes <= 3 * (COUNT * 12 + 3 * 4096)


def test_buffers_that_are_noted_are_told_as_they_are_now(engines: list[Engine]) -> None:
    engine, size = start(engines), [100]
    note_memory(engine.job, lambda: [MemoryRow("buffers", "host", size[0], locked=size[0])])
    assert by_kind(engine)["buffers"] == ("host", 100)
    size[0] = 1 << 40
    assert memory_table(engine)[0] == MemoryRow("buffers", "host", 1 << 40, 1 << 40)


def test_a_table_has_a_line_a_kind_and_a_column_a_place() -> None:
    rows = [
        MemoryRow("master", "nvme", 3 << 20),
        MemoryRow("master", "host", 1 << 19),
        MemoryRow("parameter", "device", 2 << 30),
    ]
    assert memory_text(rows).splitlines() == [
        "MiB            device        host        nvme",
        "master           0.00        0.50        3.00",
        "parameter    2,048.00        0.00        0.00",
        "total        2,048.00        0.50        3.00",
    ]


def test_what_is_page_locked_has_a_column_by_kind() -> None:
    rows = [
        MemoryRow("buffers", "host", 3 << 20, locked=1 << 20),
        MemoryRow("parameter", "host", 1 << 20, locked=1 << 20),
        MemoryRow("master", "host", 4 << 20),
    ]
    assert memory_text(rows).splitlines() == [
        "MiB            device        host      pinned        nvme",
        "buffers          0.00        3.00        1.00        0.00",
        "parameter        0.00        1.00        1.00        0.00",
        "master           0.00        4.00        0.00        0.00",
        "total            0.00        8.00        2.00        0.00",
    ]


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (0, [])])
def test_memory_breakdown_logs_it_with_every_progress_line(
    engines: list[Engine], caplog: pytest.LogCaptureFixture, every: int, steps: list[int]
) -> None:
    config = {"memory_breakdown": True, "steps_per_print": every}
    engine = start(engines, activation_offload={"enabled": True}, **config)
    with caplog.at_level(logging.INFO, "drivetrain"):
        for _ in range(4):
            step(engine)
    found = [r.getMessage() for r in caplog.records if "memory of rank 0" in r.getMessage()]
    assert [text.split(";")[0] for text in found] == [
        f"memory of rank 0 in step {n}" for n in steps
    ]
    assert all("exp_avg_sq" in text and " MiB now" in text for text in found)


def test_one_table_is_logged_where_both_plugins_are_active(
    engines: list[Engine], caplog: pytest.LogCaptureFixture
) -> None:
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    both = {"activation_offload": {"enabled": True}, **offload}
    engine = start(engines, memory_breakdown=True, steps_per_print=1, **both)
    with caplog.at_level(logging.INFO, "drivetrain"):
        step(engine)
    assert len([r for r in caplog.records if "memory of rank 0" in r.getMessage()]) == 1


def test_without_memory_breakdown_nothing_is_logged(
    engines: list[Engine], caplog: pytest.LogCaptureFixture
) -> None:
    engine = start(engines, activation_offload={"enabled": True}, steps_per_print=1)
    with caplog.at_level(logging.INFO, "drivetrain"):
        step(engine)
    assert not [r for r in caplog.records if "memory of rank 0" in r.getMessage()]


def test_the_report_tells_of_the_hosts_memory() -> None:
    rows = dict(report_memory())
    assert float(rows["host"].split()[0].replace(",", "")) > 0
    assert "bytes" in rows["limit of locked pages"]
