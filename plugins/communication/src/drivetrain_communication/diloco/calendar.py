"""When which part of the model travels: plain arithmetic on numbers of steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from zlib import crc32

_UNIT = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Calendar:
    """The steps at which fragments of a model begin to travel and arrive.

    Fragment p begins after steps H p/P, H p/P + H, ... (H inner steps, P fragments), fragment 0 not
    before H steps, and arrives ``delay`` steps later.

    Args:
        inner_steps: H, steps between two travels of a fragment.
        fragments: P.
        delay: steps under way, less than between two travels.
    """

    inner_steps: int
    fragments: int
    delay: int

    def due(self, step: int) -> int | None:
        """The fragment that begins to travel after ``step`` steps, if one does."""
        place = step % self.inner_steps
        for fragment in range(self.fragments):
            if place == self.inner_steps * fragment // self.fragments:
                return fragment if step else None
        return None

    def fragment_of(self, name: str) -> int:
        """The fragment that the parameter ``name`` is in.

        Repeated blocks go round by their number (the strided pattern of the paper, section 2.3);
        what is in no block goes where its name decides. So it is the same on all ranks.
        """
        block = _UNIT.search(name)
        number = crc32(name.encode()) if block is None else int(block.group(1))
        return number % self.fragments
