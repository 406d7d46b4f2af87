"""``drivetrain serve`` says where it listens, and ends well."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress

import httpx2
import pytest
from click.testing import CliRunner
from drivetrain_server.command import serve
from safetensors.torch import load_file, save_file


@contextmanager
def started(folder):
    """The process of the command, and where it listens."""
    command = [sys.executable, "-m", "drivetrain.cli", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                if found := re.search(r"is served at (\S+)", line):
                    break
            else:
                raise AssertionError("it has not started")
            yield process, found[1]
        finally:
            process.kill()


def test_it_serves_until_it_is_told_to_stop(folder):
    with started(folder) as (process, url):
        assert httpx2.get(f"{url}/v1/models").json()["data"][0]["id"] == folder.name
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()


def test_a_second_signal_ends_what_runs_and_a_worker_that_stands_still(folder):
    asked = {"model": folder.name, "prompt": "a", "max_tokens": 400, "stream": True}
    with started(folder) as (process, url):
        worker = httpx2.get(f"{url}/live/status").json()["workers"][0]["process"]
        try:
            with httpx2.stream("POST", f"{url}/v1/completions", json=asked) as answer:
                next(answer.iter_lines())
                os.kill(worker, signal.SIGSTOP)  # so the request would take until the time is over
                process.send_signal(signal.SIGTERM)
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(1)
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == -signal.SIGTERM
            with pytest.raises(ProcessLookupError):
                os.kill(worker, 0)
        finally:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("damage", ["cut off", "lacking"])
def test_damaged_weights_end_the_start_with_one_message(folder, tmp_path, damage):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        wanted = "cannot be loaded as a language model"
    else:
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
        wanted = f"lacks weights of the model: {name}"
    command = [sys.executable, "-m", "drivetrain.cli", "serve", str(tmp_path), "--port", "0"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode not in (0, None)
    assert "Traceback" not in found.stderr
    (line,) = [each for each in found.stderr.splitlines() if "rror: " in each]
    assert str(tmp_path) in line
    assert wanted in line


def test_a_port_that_is_taken_is_named(folder, server):
    port = server.url.rpartition(":")[2]
    found = CliRunner().invoke(serve, [str(folder), "--port", port])
    assert f"cannot listen at 127.0.0.1 port {port}" in str(found.exception)


def test_the_process_that_speaks_http_imports_no_torch():
    code = (
        "import sys, drivetrain_server.running, drivetrain_server.command;"
        "print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
