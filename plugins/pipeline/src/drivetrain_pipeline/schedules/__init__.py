"""Schedules of pipelines: streams of instructions, proofs, a simulator, timelines. No torch.

```text
 named ──> Schedule ──> validation.check             is it right?
              │  └────> messages (operations)        sends and receives between instructions
              ├───────> simulation ──> Timeline ──>  drawing: text, SVG, Chrome trace
              │            ▲              ▲
           choosing ── Costs <────── Recorder        measured in a run (comparison)
```
"""

from __future__ import annotations

from drivetrain_pipeline.schedules.advice import warnings_of
from drivetrain_pipeline.schedules.choosing import (
    Choice,
    LayerCosts,
    best_of,
    candidates,
    choose,
    costs_of,
)
from drivetrain_pipeline.schedules.comparison import beside_prediction, measured_costs
from drivetrain_pipeline.schedules.costs import Costs
from drivetrain_pipeline.schedules.drawing import Drawing, as_chrome_trace, as_svg, as_text
from drivetrain_pipeline.schedules.instruction import (
    Exchange,
    Instruction,
    Kind,
    Message,
    Operation,
)
from drivetrain_pipeline.schedules.named import NAMES, forward_only, schedule
from drivetrain_pipeline.schedules.recording import Recorder
from drivetrain_pipeline.schedules.simulation import simulate
from drivetrain_pipeline.schedules.streams import Schedule, ScheduleError
from drivetrain_pipeline.schedules.timeline import Span, Timeline
from drivetrain_pipeline.schedules.validation import check

__all__ = [
    "NAMES",
    "Choice",
    "Costs",
    "Drawing",
    "Exchange",
    "Instruction",
    "Kind",
    "LayerCosts",
    "Message",
    "Operation",
    "Recorder",
    "Schedule",
    "ScheduleError",
    "Span",
    "Timeline",
    "as_chrome_trace",
    "as_svg",
    "as_text",
    "beside_prediction",
    "best_of",
    "candidates",
    "check",
    "choose",
    "costs_of",
    "forward_only",
    "measured_costs",
    "schedule",
    "simulate",
    "warnings_of",
]
