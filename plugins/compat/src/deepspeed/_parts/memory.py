"""How much memory is used, as one line of text."""

from __future__ import annotations

import gc
import logging

from deepspeed._parts.accelerator import get_accelerator
from drivetrain.communication.process_group import Ranks

logger = logging.getLogger("deepspeed")

_GIB = 1 << 30


def see_memory_usage(message: str, force: bool = False) -> None:
    """Log this rank's memory on rank 0: the device's now and at its peak, and the process's.

    Args:
        message: what the line begins with.
        force: without it nothing is logged, so that calls may stay in a script.
    """
    if not force or Ranks.current().rank != 0:
        return
    gc.collect()
    memory_status(message)


def memory_status(msg: str, print_rank: int = -1, reset_max: bool = False) -> None:
    """Log the memory of one rank, or of all.

    Args:
        msg: what the line begins with.
        print_rank: which rank; -1 for all.
        reset_max: begin a new peak afterwards.
    """
    if print_rank not in (-1, Ranks.current().rank):
        return
    device = get_accelerator()
    used, peak = device.memory_allocated() / _GIB, device.max_memory_allocated() / _GIB
    logger.info("%s: device %.2f GiB, at most %.2f GiB", msg, used, peak)
    if reset_max:
        device.reset_peak_memory_stats()


def empty_cache() -> None:
    """Give cached memory of the device back to the system."""
    get_accelerator().empty_cache()
