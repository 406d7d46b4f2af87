"""``drivetrain bench comm`` measures every collective, and draws what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from click.testing import CliRunner
from drivetrain_communication.bench.comm_bench import comm_bench
from drivetrain_communication.bench.measure import KINDS, Row, bus_factor
from drivetrain_communication.bench.picture import picture, size_text


def test_every_collective_is_measured_by_size_beside_the_backends(tmp_path: Path) -> None:
    drawn = tmp_path / "collectives.svg"
    command = [sys.executable, "-m", "drivetrain.cli", "bench", "comm", "--ranks", "2", "--json"]
    sizes = ["--smallest", "4k", "--largest", "64k", "--seconds", "0.001"]
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    done = subprocess.run(
        [*command, *sizes, "--picture", str(drawn)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {row["kind"] for row in rows} == {str(kind) for kind in KINDS}
    assert {row["nbytes"] for row in rows} == {4 << 10, 16 << 10, 64 << 10}
    for row in rows:
        assert row["seconds"] > 0
        assert row["backend_seconds"] > 0
        assert row["bus_bandwidth"] == pytest.approx(
            row["nbytes"] / row["seconds"] * bus_factor(row["kind"], 2)
        )
    lines = ET.parse(drawn).getroot().findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2 * len(KINDS)  # ours, and the backend's


def test_bandwidths_are_those_of_nccl_tests() -> None:
    row = Row("all_reduce", 1000, 0.5, None, 4)
    assert (row.algorithm_bandwidth, row.bus_bandwidth) == (2000, 3000)
    assert bus_factor("all_gather", 4) == bus_factor("reduce_scatter", 4) == 0.75
    assert bus_factor("broadcast", 4) == 1


def test_one_size_alone_can_be_drawn() -> None:
    assert "<polyline" in picture([Row("all_gather", 1 << 20, 0.1, 0.2, 2)], "t < u")
    assert [size_text(n) for n in (512, 1 << 10, 3 << 20)] == ["512 B", "1 KiB", "3 MiB"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--smallest", "1M", "--largest", "1k"], "below --smallest"),
        (["--largest", "many"], "no size such as"),
        (["--ranks", "1"], "--ranks"),
        (["--op", "gather_all"], "--op"),
        ([], "has one rank here"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    result = CliRunner().invoke(comm_bench, arguments)
    assert result.exit_code != 0
    assert message in result.output
