"""Work of a GPU that is captured once and repeated: CUDA's graphs, and those of HIP."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger("drivetrain.kernels")


def capture(function: Callable[[], None]) -> Callable[[], None] | None:
    """What repeats the work that ``function`` queues on the current device.

    ``None``, with a line in the log, if it does what a graph cannot hold, such as waiting.
    """
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    current = torch.cuda.current_stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):  # libraries take memory and choose algorithms once
        function()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError as error:
        logger.info("work is not captured: %s", error)
        return None
    replay: Callable[[], None] = graph.replay
    return replay
