"""Instructions of one stage, and the messages between stages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

Kind = Literal["F", "B", "I", "W"]
"""Forward; full backward; gradients of inputs alone; gradients of weights alone."""

_TEXT = re.compile(r"([FBIW])(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One pass of one micro-batch through one chunk.

    Args:
        kind: which pass.
        micro_batch: its number in the step, from 0.
        chunk: its number along the model, from 0.
    """

    kind: Kind
    micro_batch: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}.{self.chunk}"

    @classmethod
    def parse(cls, text: str) -> Instruction:
        """Read what ``str`` has written, such as ``F3.0``.

        Raises:
            ValueError: ``text`` is no instruction.
        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no instruction, which is written like F3.0 or W12.1")
        kind, micro_batch, chunk = found.groups()
        return cls(cast("Kind", kind), int(micro_batch), int(chunk))


@dataclass(frozen=True, slots=True)
class Message:
    """What one chunk makes and the next chunk of its direction, on another stage, needs.

    Args:
        kind: "F" for outputs, which go to the chunk after; "B" for gradients of inputs, which go to
            the chunk before.
        micro_batch: its number in the step.
        chunk: the chunk that makes it.
        source: the stage of that chunk.
        target: the stage that receives it.
    """

    kind: Literal["F", "B"]
    micro_batch: int
    chunk: int
    source: int
    target: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}.{self.chunk}:{self.source}>{self.target}"


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a stage exchanges with another one at once, between two of its instructions.

    Args:
        sends: what leaves this stage, one message at most.
        receives: what arrives, one message at most.
    """

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]

    def __str__(self) -> str:
        return " ".join([*(f">{m}" for m in self.sends), *(f"<{m}" for m in self.receives)])


Operation = Instruction | Exchange
