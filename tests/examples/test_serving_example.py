"""What an example has trained with Drivetrain is served from its checkpoint."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from drivetrain_inference import serve


def ask(url: str, path: str, body: dict[str, object]) -> dict[str, Any]:
    request = Request(
        f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_a_checkpoint_of_training_is_served(root: Path, tmp_path: Path) -> None:
    """``examples/serve_trained.py`` leaves weights; the server says what the engine says."""
    out = tmp_path / "run"
    command = [
        *(sys.executable, "examples/serve_trained.py", "--out", str(out), "--port", "0"),
        *("--steps", "12", "--layers", "2", "--width", "64"),
    ]
    process = subprocess.Popen(
        command, cwd=root, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"is served at (\S+)", line):
                break
        else:
            raise AssertionError("".join(lines))
        asked = {"model": out.name, "prompt": "import ", "max_tokens": 12, "temperature": 0}
        answer = ask(found[1], "/v1/completions", asked)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)

    with serve(out, weights=out / "checkpoints") as engine:
        params = engine.sampling(max_new_tokens=12, temperature=0.0)
        wanted = engine.generate(["import "], params)[0][0].text
    assert answer["choices"][0]["text"] == wanted
    assert wanted
