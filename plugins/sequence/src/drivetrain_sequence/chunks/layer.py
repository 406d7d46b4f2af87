"""The attention of a chunk, as a layer of the job's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.errors import TrainingError
from drivetrain_sequence.ring import check_by_blocks, scoring_of
from drivetrain_sequence.section import PATH
from drivetrain_sequence.visible import Seen

if TYPE_CHECKING:
    from drivetrain.contracts import Attention, AttentionFacts
    from drivetrain_sequence.turn import Turn


def attend_by_chunks(turn: Turn) -> Attention:
    """Attention of a chunk's queries, of all its tokens, to the keys of all chunks."""

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        facts: AttentionFacts,
    ) -> torch.Tensor:
        work = turn.work
        if work is None:
            raise TrainingError(
                f"{type(module).__name__} attends outside of the model's repeated blocks, which "
                f"alone are computed in chunks of the sequence: leave out {PATH}.chunk"
            )
        if query.shape[2] != key.shape[2]:
            raise TrainingError(
                f"a block attends to keys of another sequence, which has no chunks: leave out "
                f"{PATH}.chunk"
            )
        check_by_blocks(facts, f"{PATH}.chunk", "leave it out")
        visible = Seen.by(facts, work.chunks[-1].stop, query)
        segments = facts.segments
        if segments is not None:
            segments = segments.expand(query.shape[0], -1)
        scoring = scoring_of(facts, query)
        output = work.attend(query, key, value, facts.sinks, scoring, visible, segments)
        return output.transpose(1, 2)

    return attend
