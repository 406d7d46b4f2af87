"""The kit for accelerators on a device in C++ that torch does not have, of its PrivateUse1 kind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from drivetrain.testing import AcceleratorConformance
from drivetrain.testing.distributed import start_anew

sys.path.insert(0, str(Path(__file__).parent / "private_use"))

import broken_warp
from warp_accelerator import Warp, library


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Ranks find the device in the cache; it takes half a minute to compile.

    They are new ones: torch's autograd knows only devices that were there when it first ran.
    """
    library().ensure_built()
    start_anew()


class TestWarp(AcceleratorConformance):
    accelerator = Warp


@pytest.mark.parametrize(
    ("kind", "check", "words"),
    [
        (broken_warp.ProbeTouchesDevice, "test_the_probe_answers", "no device context"),
        (broken_warp.AllRanksOnOneDevice, "test_every_rank_gets_a_device", "2 ranks on 2 devices"),
        (broken_warp.DoesNotBecomeCurrent, "test_start_leaves_torch_alone", "warp:1 to be current"),
        (broken_warp.CountsHostMemory, "test_memory_figures_fit", "to rise by the 67108864 bytes"),
        (broken_warp.PinsNothing, "test_pinned_memory_holds_its_values", "to lock pages"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_flaw_that_the_cpu_cannot_have_is_caught_by_its_check(kind, check, words) -> None:
    kit = type("Kit", (AcceleratorConformance,), {"accelerator": kind})()
    with pytest.raises(AssertionError, match=f"^{check}: expected ") as caught:
        getattr(kit, check)()
    assert words in str(caught.value)
