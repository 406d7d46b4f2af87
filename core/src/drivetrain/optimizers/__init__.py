"""Optimizers: update rules over flat buckets, and the facade that training loops see."""

from drivetrain.optimizers.factory import make_rule, optimizer_plan, rule_from_optimizer
from drivetrain.optimizers.optimizer import EngineOptimizer
from drivetrain.optimizers.torch_rule import TorchRule

__all__ = ["EngineOptimizer", "TorchRule", "make_rule", "optimizer_plan", "rule_from_optimizer"]
