"""Saving and loading: whole or not at all, from any layout into any other.

``save`` collects what a rank owns (:mod:`~drivetrain.checkpoint.save`), writes it, and makes the
checkpoint appear when all ranks have written (:mod:`~drivetrain.checkpoint.format.commit`).
``load`` reads
what a rank needs (:mod:`~drivetrain.checkpoint.format.reading`). The format is described in
:mod:`~drivetrain.checkpoint.format.index`.
"""

from drivetrain.checkpoint.format.commit import PendingSave
from drivetrain.checkpoint.load import load
from drivetrain.checkpoint.save import save
from drivetrain.contracts.state.extra import StateReader, StateWriter

__all__ = ["PendingSave", "StateReader", "StateWriter", "load", "save"]
