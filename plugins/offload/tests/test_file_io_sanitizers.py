"""The file engines in C++ under the sanitizers: no races, no overruns, nothing undefined."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from drivetrain_kernels.native import CXX
from drivetrain_offload.file_io.native_engine import NATIVE, SOURCES

HERE = Path(__file__).parent


@pytest.mark.parametrize("kind", ["thread", "address,undefined"])
def test_an_engine_that_many_threads_use_is_sound(kind: str, tmp_path: Path) -> None:
    made = tmp_path / "program"
    sources = [NATIVE / f"{name}.cpp" for name in SOURCES if name != "api"]
    flags = ["-std=c++17", "-g", "-O1", "-pthread", f"-I{NATIVE}", f"-fsanitize={kind}"]
    flags += ["-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Werror"]
    command = [*CXX.command(), *flags, *sources, HERE / "file_io_in_threads.cpp", "-o", made]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr:
        pytest.skip("the compiler has no such sanitizer")
    assert built.returncode == 0, built.stderr
    found = subprocess.run(
        [made, tmp_path / "file"], capture_output=True, text=True, timeout=300, check=False
    )
    assert found.stdout.strip() == "fine", found.stderr[-3000:]
    assert found.returncode == 0
