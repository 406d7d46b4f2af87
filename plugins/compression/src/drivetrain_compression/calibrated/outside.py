"""What methods have to do with the parts of a model that are outside of its blocks."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from drivetrain.states.units import Unit
from drivetrain_compression.calibrated.pairs import Call
from drivetrain_compression.calibrated.residual import Norm


@dataclass(frozen=True)
class Outside:
    """What makes hidden states, and what takes those of the last block.

    Args:
        width: features of hidden states.
        embeddings: paths of those whose sum hidden states are.
        norm: the last norm, and the layers that take its output.
        untied: those among them that share the weight of an embedding, and may not any more.
    """

    width: int
    embeddings: tuple[str, ...]
    norm: Norm
    untied: tuple[str, ...]

    def write(self, path: Path) -> None:
        """Keep for a job that goes on."""
        path.write_text(json.dumps(asdict(self)), "utf-8")

    @classmethod
    def read(cls, path: Path) -> Outside:
        """What :meth:`write` kept."""
        data = json.loads(path.read_text("utf-8"))
        norm = data["norm"]
        return cls(
            data["width"],
            tuple(data["embeddings"]),
            Norm(norm["name"], norm["neutral"], tuple(norm["readers"])),
            tuple(data["untied"]),
        )


class ReadsOutside(ABC):
    """A method that changes parts outside of blocks, before anything passes through the blocks."""

    label: str

    @abstractmethod
    def outside(
        self, model: nn.Module, blocks: Sequence[Unit], batch: Mapping[str, Any], tuples: bool
    ) -> Outside:
        """Find what is to be changed; nothing is.

        Args:
            model: all but its blocks has values.
            blocks: of it.
            batch: arguments of a forward.
            tuples: whether blocks return tuples.

        Raises:
            ConfigError: the method cannot be applied; says what is in the way.
        """

    @abstractmethod
    def try_block(self, block: Unit, call: Call) -> None:
        """Find out whether a block can be changed; nothing is, neither inside nor outside.

        Called for every block before the first change, if the model has no other copy of its
        values. In other cases a method finds out when it changes the block.

        Args:
            block: of a model that is as it was.
            call: how it is called; [rows, tokens, hidden] first.

        Raises:
            ConfigError: it cannot; says what is in the way.
        """

    @abstractmethod
    def change_outside(self, model: nn.Module, found: Outside) -> None:
        """Change what was found, in place; layers in ``found.untied`` have weights of their own."""
