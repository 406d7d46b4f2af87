"""Random numbers by micro-batch: dropout that does not know which rank draws it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from drivetrain.errors import TrainingError

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine

_STREAM = "dropout"


class DropoutStreams:
    """Begins the job's stream "dropout" anew for each micro-batch of the global batch.

    The micro-batch's place in the global batch is what core's loader deals by: each round gives
    one to every data shard.
    """

    def __init__(self) -> None:
        self._micro_batch = (-1, -1)
        self._forwards = 0
        self._begun: torch.Tensor | None = None

    def begin(self, engine: Engine) -> None:
        """Before a forward of an engine that trains."""
        job, progress = engine.job, engine.progress
        micro_batch = progress.steps, progress.in_window
        self._forwards = self._forwards + 1 if micro_batch == self._micro_batch else 0
        self._micro_batch = micro_batch
        shards, shard = job.mesh.size("dp"), job.mesh.coordinate("dp")
        place = progress.steps, progress.in_window * shards + shard, self._forwards
        digest = hashlib.sha256(repr((job.random.seed, *place)).encode()).digest()
        generator = job.random.generator(_STREAM)
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if job.mesh.size("pp") > 1:
            self._begun = generator.get_state()

    def refuse_drawn(self, engine: Engine) -> None:
        """Check that stages of a pipeline draw nothing: each would begin the stream by itself.

        Raises:
            TrainingError: this one did.
        """
        begun, self._begun = self._begun, None
        if begun is None or torch.equal(begun, engine.job.random.generator(_STREAM).get_state()):
            return
        raise TrainingError(
            "exact: the layers of this stage draw random numbers (dropout), and stages of a "
            "pipeline draw others than one process would: set dropout to 0, or leave out the "
            "pipeline"
        )
