"""Every example of every op under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from drivetrain_cpu.instruction_sets import runnable
from drivetrain_kernels.native import CXX

PROGRAM = """
import sys
import torch
from drivetrain_cpu.instruction_sets import selected
from drivetrain_cpu.kernels import FLAGS, HEADERS, NATIVE, SOURCES, _BINDINGS, _with_reference
from drivetrain_cpu.openmp import share_openmp
from drivetrain_kernels import ops
from drivetrain_kernels.native import NativeLibrary

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1")
library = NativeLibrary(
    f"drivetrain_cpu_{selected().name}_sanitized",
    [NATIVE / f"{name}.cpp" for name in SOURCES],
    headers=[NATIVE / f"{name}.h" for name in HEADERS],
    flags=(*FLAGS, *selected().flags, *SANITIZE),
    link_flags=SANITIZE[:1],
    before_load=share_openmp,
).load()
torch.set_num_threads(2)
calls = 0
for op in ops():
    function = _with_reference(op, _BINDINGS[op.name])(library)
    for example in op.examples(torch.device("cpu")):
        function(*example.arguments)
        calls += 1
if sys.argv[1:] == ["overrun"]:
    values = torch.zeros(100)
    short = torch.zeros(90)
    _BINDINGS["cast_copy"](library)(values, short, None, 1.0, None)
print("calls", calls)
"""


def run(path, *arguments):
    compiler = CXX.command()[0]
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip("the compiler has no sanitizer runtimes")
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "DRIVETRAIN_CPU_PATH": path,
    }
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("path", [each.name for each in runnable()[:1]])
def test_kernels_touch_only_their_memory(path):
    found = run(path)
    assert found.returncode == 0, found.stderr[-3000:]
    assert int(found.stdout.split()[-1]) > 500


def test_the_sanitizers_notice_an_overrun():
    found = run(runnable()[0].name, "overrun")
    assert found.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in found.stderr
