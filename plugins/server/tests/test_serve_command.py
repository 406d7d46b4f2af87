"""``drivetrain serve`` says where it listens, and ends well."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import httpx2
from click.testing import CliRunner
from drivetrain_server.command import serve


def test_it_serves_until_it_is_told_to_stop(folder):
    command = [sys.executable, "-m", "drivetrain.cli", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                if found := re.search(r"is served at (\S+)", line):
                    break
            else:
                raise AssertionError("it has not started")
            assert httpx2.get(f"{found[1]}/v1/models").json()["data"][0]["id"] == folder.name
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) in (0, -signal.SIGTERM)
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


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
