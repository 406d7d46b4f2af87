"""The memory estimators against the formulas, worked out by hand."""

from __future__ import annotations

import drivetrain_zero as zero
import pytest
from torch import nn

P, L = 3_000_000_000, 33_000_000


@pytest.mark.parametrize(
    ("offload", "gpus", "nodes", "expected"),
    [
        (True, 8, 1, (P * 32 * 1.5, 2 * P)),
        (True, 2, 1, (P * 16 * 1.5, 2 * P)),
        (False, 8, 2, (4 * P * 8 * 1.5, 2 * P + 18 * P / 16)),
    ],
)
def test_stage_2(offload, gpus, nodes, expected) -> None:
    got = zero.estimate_zero2_model_states_mem_needs(P, gpus, nodes, cpu_offload=offload)
    assert got == tuple(int(number) for number in expected)


@pytest.mark.parametrize(
    ("offload", "parameters", "init", "gpus", "nodes", "host", "device"),
    [
        (True, True, True, 8, 2, 18 * P / 2, 4 * L),
        (True, True, False, 8, 2, P * 32, 4 * L),
        (True, True, False, 1, 2, P * 9, 4 * L),
        (True, False, True, 8, 2, 16 * P / 2, 4 * L + 2 * P / 16),
        (True, False, False, 8, 1, P * 32, 4 * L + 2 * P / 8),
        (False, False, True, 8, 1, 4 * L * 8, 4 * L + 18 * P / 8),
        (False, False, False, 8, 1, 4 * P * 8, 4 * L + 18 * P / 8),
    ],
)
def test_stage_3(offload, parameters, init, gpus, nodes, host, device) -> None:
    got = zero.estimate_zero3_model_states_mem_needs(
        P, L, gpus, nodes, offload, parameters, init, additional_buffer_factor=1.5
    )
    assert got == (int(host * 1.5), int(device), 4 * L)


def test_tables_count_a_live_model(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(1000, 3000), nn.Sequential(nn.Linear(3000, 1000)))
    zero.estimate_zero3_model_states_mem_needs_all_live(model, num_gpus_per_node=2)
    table = capsys.readouterr().out
    assert "Model with 6M total params, 3M largest layer params" in table
    assert table.count("offload_param=") == 6
    assert "   0.15GB |   0.01GB | offload_param=cpu, offload_optimizer=cpu, zero_init=1" in table
    zero.estimate_zero2_model_states_mem_needs_all_live(model, num_gpus_per_node=2)
    table = capsys.readouterr().out
    assert "   0.13GB |   0.01GB | offload_optimizer=cpu" in table
    assert "   0.07GB |   0.06GB | offload_optimizer=none" in table
