"""Methods that scripts for ZeRO call on an engine, beside ``save_16bit_model``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from drivetrain_zero.section import ZeroSection

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine


@contextmanager
def coalesce_grad_reduction(engine: Engine) -> Iterator[None]:
    """Reduce the gradients of all backward passes inside the block once, in the step after it.

    Every rank keeps whole gradients until then, so it costs the memory of stage 1.

    Args:
        engine: at any stage.

    Raises:
        TrainingError: ``step`` is called inside the block, or the block is inside another one or
            inside ``no_sync``.
    """
    with engine.no_sync():
        yield


def zero_optimization_stage(engine: Engine) -> int:
    """The stage of ZeRO that the engine runs; 0 for none."""
    return engine.job.plan.section(ZeroSection).stage
