"""Update rules that torch does not have in a form for flat buckets: Lamb, Lion, Muon."""

from drivetrain_optimizers.lamb import Lamb
from drivetrain_optimizers.lion import Lion
from drivetrain_optimizers.muon import Muon

__all__ = ["Lamb", "Lion", "Muon"]
