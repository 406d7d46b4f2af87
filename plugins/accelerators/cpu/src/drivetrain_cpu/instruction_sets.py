"""Which instruction-set paths of the native kernels exist, and which one this machine runs."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from drivetrain.errors import ConfigError

VARIABLE = "DRIVETRAIN_CPU_PATH"
"""Environment variable that names a path other than the best."""


@dataclass(frozen=True)
class InstructionSet:
    """One way to compile the kernels.

    Args:
        name: ``amx``, ``avx512bf16``, ``avx512``, ``avx2``, ``neon`` or ``generic``.
        machines: values of ``platform.machine()`` it exists on; empty for all.
        features: flags that ``/proc/cpuinfo`` must list.
        flags: compiler flags.
    """

    name: str
    machines: tuple[str, ...]
    features: frozenset[str]
    flags: tuple[str, ...]


_X86 = ("x86_64", "AMD64")
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c"})
_AVX512_FLAGS = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"),
    "-mprefer-vector-width=512",
)
# Products of bfloat16 pairs and of bytes, which only matrix products use. Every processor that has
# the former has the latter.
_PAIRS = _AVX512 | {"avx512_bf16", "avx512_vnni"}
_PAIRS_FLAGS = (*_AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni")
INSTRUCTION_SETS = (
    # Some functions are compiled for the matrix unit, and ask whether the process may use it. A
    # compiler that does not know it leaves them out.
    InstructionSet(
        "amx",
        _X86,
        _PAIRS | {"amx_tile", "amx_bf16"},
        (*_PAIRS_FLAGS, "-DDRIVETRAIN_AMX"),
    ),
    InstructionSet("avx512bf16", _X86, _PAIRS, _PAIRS_FLAGS),
    InstructionSet("avx512", _X86, _AVX512, _AVX512_FLAGS),
    InstructionSet("avx2", _X86, frozenset({"avx2", "f16c"}), ("-mavx2", "-mf16c")),
    # Every 64-bit ARM processor has NEON, and compilers use it without being told.
    InstructionSet("neon", ("aarch64", "arm64"), frozenset(), ()),
    InstructionSet("generic", (), frozenset(), ()),
)
"""All paths, the fastest first; ``generic`` is what the plain architecture offers."""


def compilable() -> tuple[InstructionSet, ...]:
    """The paths that a compiler for this architecture can build."""
    machine = platform.machine()
    return tuple(each for each in INSTRUCTION_SETS if not each.machines or machine in each.machines)


def runnable() -> tuple[InstructionSet, ...]:
    """The paths that this machine can run, the fastest first."""
    present = processor_features()
    return tuple(each for each in compilable() if each.features <= present)


def selected() -> InstructionSet:
    """The path to use: the fastest, or the one that ``DRIVETRAIN_CPU_PATH`` names.

    Raises:
        ConfigError: that one does not exist or does not run here.
    """
    usable = {each.name: each for each in runnable()}
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return next(iter(usable.values()))
    if wanted not in usable:
        known = ", ".join(usable)
        raise ConfigError(f"{VARIABLE}={wanted!r} does not run here; choose one of {known}")
    return usable[wanted]


@cache
def processor_features(read: Callable[[], str] | None = None) -> frozenset[str]:
    """Feature flags of this machine's processors, as Linux names them; empty where unknown."""
    try:
        text = read() if read is not None else Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        label, _, value = line.partition(":")
        if label.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
