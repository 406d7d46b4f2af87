"""Curriculum by sequence length: training begins on short sequences and goes on to longer ones.

Li, Zhang and He 2022, "The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup for
Training GPT Models", https://arxiv.org/abs/2108.06084.
"""

from __future__ import annotations

from drivetrain_curriculum.plugin import Curriculum, current_difficulty, set_schedule
from drivetrain_curriculum.schedule import Pacing, difficulty_at
from drivetrain_curriculum.section import CurriculumSection, ScheduleConfig

__all__ = [
    "Curriculum",
    "CurriculumSection",
    "Pacing",
    "ScheduleConfig",
    "current_difficulty",
    "difficulty_at",
    "set_schedule",
]
