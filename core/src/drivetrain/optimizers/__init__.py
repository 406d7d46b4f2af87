"""Optimizers: update rules over flat buckets, and the facade that training loops see."""

from drivetrain.optimizers.factory import make_rule, optimizer_plan, rule_from_optimizer
from drivetrain.optimizers.lamb import Lamb
from drivetrain.optimizers.lion import Lion
from drivetrain.optimizers.muon import Muon
from drivetrain.optimizers.optimizer import EngineOptimizer
from drivetrain.optimizers.torch_rule import TorchRule

__all__ = [
    "EngineOptimizer",
    "Lamb",
    "Lion",
    "Muon",
    "TorchRule",
    "make_rule",
    "optimizer_plan",
    "rule_from_optimizer",
]
