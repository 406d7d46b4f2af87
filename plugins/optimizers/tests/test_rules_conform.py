"""Every rule of this package holds to what Drivetrain asks of an update rule."""

from __future__ import annotations

import torch
from drivetrain_optimizers import Lamb, Lion, Muon
from drivetrain_optimizers.lookahead import LookaheadRule
from drivetrain_optimizers.weight_average import AveragingRule

from drivetrain.optimization.torch_rule import TorchRule
from drivetrain.testing import OptimizerConformance


class TestLamb(OptimizerConformance):
    def rule(self):
        return Lamb(lr=0.1, weight_decay=0.1, bias_correction=True)


class TestLion(OptimizerConformance):
    def rule(self):
        return Lion(lr=0.1, weight_decay=0.1)


class TestMuonOnMatrices(OptimizerConformance):
    def rule(self):
        return MatrixMuon(lr=0.1, weight_decay=0.1)


class TestLookahead(OptimizerConformance):
    def rule(self):
        return LookaheadRule(TorchRule(torch.optim.AdamW, {"lr": 0.1}), steps=2, alpha=0.5)


class TestAverage(OptimizerConformance):
    def rule(self):
        return AveragingRule(Lion(lr=0.1), decay=0.5)


class MatrixMuon(Muon):
    """Takes the vector of the kit for a matrix of one row."""

    def update(self, bucket, hyper, scale):
        from dataclasses import replace

        bucket.segments = [
            replace(s, shape=(1, *s.shape)) if len(s.shape) < 2 else s for s in bucket.segments
        ]
        super().update(bucket, hyper, scale)
