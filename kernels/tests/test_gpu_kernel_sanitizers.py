"""The GPU kernels touch only their memory: every example under the address sanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from drivetrain_kernels.native import CXX

PROGRAM = """
import sys
from contextlib import contextmanager
from pathlib import Path
import torch
from drivetrain_kernels import ops
from drivetrain_kernels.gpu import BINDINGS, Kernels, gpu_library
from drivetrain_kernels.native import CXX

@contextmanager
def no_stream(device):
    yield 0

header = Path(sys.argv[1])
flags = ("-x", "c++", "-std=c++17", "-O1", "-g", "-fPIC", "-ffp-contract=off",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
         f'-DDRIVETRAIN_GPU_RUNTIME="{header}"')
library = gpu_library("drivetrain_gpu_sanitized", toolchain=CXX, flags=flags,
                      link_flags=("-fsanitize=address,undefined",)).load()
kernels, calls = Kernels(library, no_stream), 0
if sys.argv[2:] == ["overrun"]:
    BINDINGS["cast_copy"](kernels)(torch.zeros(100), torch.zeros(90), None, 1.0, None)
for op in ops("training"):
    function = BINDINGS[op.name](kernels)
    for example in op.examples(torch.device("cpu")):
        function(*example.arguments)
        calls += 1
print("calls", calls)
"""


def run(*arguments):
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
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    header = Path(__file__).with_name("emulated_gpu.h")
    command = [sys.executable, "-c", PROGRAM, str(header), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_kernels_touch_only_their_memory():
    found = run()
    assert found.returncode == 0, found.stderr[-3000:]
    assert int(found.stdout.split()[-1]) > 500


def test_the_sanitizer_notices_an_overrun():
    found = run("overrun")
    assert found.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in found.stderr
