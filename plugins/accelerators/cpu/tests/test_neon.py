"""The NEON path returns the bits of the generic path; an emulator stands in for the processor."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from drivetrain_cpu.instruction_sets import INSTRUCTION_SETS
from drivetrain_cpu.kernels import FLAGS, NATIVE, SOURCES, kernel_library
from drivetrain_kernels.native import CXX

PROGRAM = Path(__file__).with_name("every_kernel.cpp")
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"

pytestmark = [
    pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"{CROSS} is not installed"),
    pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"{EMULATOR} is not installed"),
    pytest.mark.skipif(platform.machine() == "aarch64", reason="the other tests run NEON here"),
]


def compiled(compiler, output, *inputs):
    command = [compiler, str(PROGRAM), *inputs, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return output


def printed(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What the program prints with this machine's kernels, and with those for ARM."""
    folder = tmp_path_factory.mktemp("neon")
    (generic,) = (path for path in INSTRUCTION_SETS if path.name == "generic")
    library = kernel_library(generic).ensure_built()
    options = ("-std=c++17", "-O1", "-fopenmp", f"-Wl,-rpath,{library.parent}")
    here = compiled(CXX.command()[0], folder / "here", *options, str(library))
    sources = [str(NATIVE / f"{name}.cpp") for name in SOURCES]
    there = compiled(CROSS, folder / "there", *FLAGS, "-Werror", "-Wall", "-static", *sources)
    return printed(str(here)), printed(EMULATOR, str(there))


def test_every_kernel_writes_the_same_bits_as_on_this_machine(outputs):
    here, there = outputs
    assert len(here) > 600
    differing = [
        f"{one} != {other}" for one, other in zip(here, there, strict=True) if one != other
    ]
    assert not differing, "\n".join(differing[:20])
