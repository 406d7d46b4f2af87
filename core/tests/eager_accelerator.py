"""An accelerator that is sound but for its module, which imports torch."""

from __future__ import annotations

import torch  # noqa: F401 - which is the flaw

from drivetrain.job.accelerator_choice import HostAccelerator


class Eager(HostAccelerator):
    name = "broken"
