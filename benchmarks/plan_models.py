"""Models of plan.py: functions without arguments, each makes one."""

from __future__ import annotations

from torch import nn

from drivetrain.testing.models import TinyGPT


def TINY() -> nn.Module:  # noqa: N802 - one of the names on the command line
    """A model of no size, whose steps load what steps load."""
    return TinyGPT(vocabulary=100, width=32, layers=2, positions=8)


def gpt() -> nn.Module:
    """29 million parameters: eight blocks of width 512."""
    return TinyGPT(vocabulary=4096, width=512, layers=8, heads=8, positions=512)


def wide() -> nn.Module:
    """29 million parameters: two blocks of width 1024."""
    return TinyGPT(vocabulary=2048, width=1024, layers=2, heads=8, positions=512)


def billion() -> nn.Module:
    """1.3 billion parameters: 24 blocks of width 2048, as GPT-3 XL (arXiv:2005.14165)."""
    return TinyGPT(vocabulary=50_257, width=2048, layers=24, heads=16, positions=2048)
