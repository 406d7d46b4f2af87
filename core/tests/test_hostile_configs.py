"""Every hostile config ends soon, in little memory, with one clear error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("hostile_configs.py")
SECONDS = 2.0


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and measured as on Linux")
@pytest.mark.parametrize("parser", ["native", "pure"])
def test_every_hostile_config_is_refused_soon_and_clearly(tmp_path: Path, parser: str) -> None:
    before = sorted(Path.cwd().iterdir())
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path), parser],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) >= 100
    for result in results:
        said = result["said"]
        assert not said.startswith("NOT"), result
        # Other processes take their part of the wall's time; a config that waits would take all.
        assert result["seconds"]["cpu"] < SECONDS, result
        assert result["seconds"]["wall"] < 10 * SECONDS, result
        assert all(c.isprintable() or c == "\n" for c in said), result
        assert all(line.strip() for line in said.split("\n")[:1]), result
        assert said.count("\n") <= 101, result
        assert len(said) < 30_000, result
        assert "Traceback" not in said, result
    assert sorted(Path.cwd().iterdir()) == before


def test_one_wrong_place_is_one_problem(tmp_path: Path) -> None:
    from drivetrain.errors import ConfigError
    from drivetrain.plan.config.loading import load_config

    path = tmp_path / "c.json"
    path.write_text('{"a": 1, // \x1b[31m\n "b": 1e999, "b": 2}')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (problem,) = caught.value.problems
    first, excerpt, mark = problem.split("\n")
    assert first.endswith("line 2, column 7: 1e999 is too large for a number")
    assert excerpt[mark.index("^") :].startswith("1e999")
