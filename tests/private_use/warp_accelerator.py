"""An accelerator for a C++ device of torch's PrivateUse1 kind; `build` first."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from drivetrain.contracts import Accelerator

if TYPE_CHECKING:
    from drivetrain_kernels.native import NativeLibrary

SOURCE = Path(__file__).with_name("warp.cpp")


class Warp(Accelerator):
    """Only what has no default: the rest is what core makes of torch's module for the device."""

    name = "warp"
    device_type = "warp"

    def probe(self) -> str | None:
        import torch

        if not hasattr(torch, "warp"):
            register()
        return None

    def communication_backend(self) -> str:
        return "gloo"


class Event:
    """Reached as soon as it is recorded."""

    def wait(self, stream: Stream | None = None) -> None:
        return

    def synchronize(self) -> None:
        return


class Stream:
    """The device runs everything at once."""

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def query(self) -> bool:
        return True

    def record_event(self) -> Event:
        return Event()


def library() -> NativeLibrary:
    """The device's library, in the cache of kernels."""
    import torch
    from drivetrain_kernels.native import NativeLibrary

    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include' / part}" for part in ("", "torch/csrc/api/include")]
    link = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    flags = ["-std=c++20", "-O1", "-fPIC", *include]
    return NativeLibrary("warp", [SOURCE], flags=flags, link_flags=link)


def register() -> None:
    """Make torch know the device."""
    import torch

    native: Any = library().load()
    for name in ("warp_allocated", "warp_peak"):
        getattr(native, name).restype = ctypes.c_int64
    torch.utils.rename_privateuse1_backend("warp")
    torch._register_device_module("warp", module(native))
    torch.utils.generate_methods_for_privateuse1_backend()


def module(native: Any) -> ModuleType:
    """What ``torch.warp`` offers."""
    import torch

    found = ModuleType("torch.warp")
    state = SimpleNamespace(used=False)
    members: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: state.used,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: setattr(state, "used", True),
        "synchronize": lambda: None,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: stream,
        "manual_seed_all": lambda seed: None,  # the generator is the host's
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda new, device=None: torch.set_rng_state(new),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "memory_allocated": native.warp_allocated,
        "max_memory_allocated": native.warp_peak,
        "reset_peak_memory_stats": native.warp_reset_peak,
        "limit_memory": lambda total=2**62: native.warp_limit(ctypes.c_int64(total)),
        "mem_get_info": lambda: (2**33 - native.warp_allocated(), 2**33),
    }
    vars(found).update(members)
    sys.modules[found.__name__] = found
    return found
