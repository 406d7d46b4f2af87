"""Data loading and random streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from drivetrain.contracts.plugin.plugin import Plugin, Sections
from drivetrain.contracts.plugin.section import Bool, NonNegativeInt, PositiveInt, Scalar


class DataloaderDropLast(Scalar[Bool]):
    """Drop the last micro-batch of an epoch when it is not full (default false)."""

    root: Bool = False


class VocabularySize(Scalar[PositiveInt | None]):
    """Tokens in the model's vocabulary; only used to advise on padding it."""

    root: PositiveInt | None = None


class Seed(Scalar[NonNegativeInt]):
    """Seed of all random streams of the job: order of samples, dropout (default 1234)."""

    root: NonNegativeInt = 1234


class Data(Plugin):
    """Owns the keys of the data loader and the job's seed."""

    name = "data"
    sections: ClassVar[Sections] = {
        "dataloader_drop_last": DataloaderDropLast,
        "vocabulary_size": VocabularySize,
        "seed": Seed,
    }

    def notes(self) -> Sequence[str]:
        size = self.section(VocabularySize).root
        if size is None or size % 8 == 0:
            return []
        padded = size + 8 - size % 8
        return [f"vocabulary_size: {size} is no multiple of 8; matrix units are faster at {padded}"]
