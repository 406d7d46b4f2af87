"""Names that core knows without having them, so that an error can say what to install or to use.

They stand in ``known.json``. A test holds it against the workspace: every name that a first-party
distribution serves is listed there under that distribution, and what is planned does not exist.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

_TABLE = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))

OWNERS: Mapping[str, Mapping[str, str]] = _TABLE["owners"]
"""Entry point group -> name -> first-party distribution that serves it."""

PLANNED: frozenset[str] = frozenset(_TABLE["planned"])
"""Those of the distributions that do not exist yet."""

ENGINE: Mapping[str, str] = _TABLE["engine"]
"""Attribute of DeepSpeed's engine that no engine has here -> what to use in its place."""

SECTIONS = OWNERS["plugins"]
"""Config path -> first-party distribution that serves it."""

TORCH_OPTIMIZERS = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon"),
    *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam"),
)
"""Classes of ``torch.optim``, which are looked up there when no entry serves them."""

TORCH_SCHEDULERS = (
    *("ChainedScheduler", "ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts"),
    *("CyclicLR", "ExponentialLR", "LambdaLR", "LinearLR", "MultiStepLR", "MultiplicativeLR"),
    *("OneCycleLR", "PolynomialLR", "ReduceLROnPlateau", "SequentialLR", "StepLR"),
)
"""Classes of ``torch.optim.lr_scheduler``, likewise."""
