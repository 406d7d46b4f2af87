"""The plugin: a layer of the communicator, and what it has left out in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

from drivetrain.contracts import (
    Communicator,
    CommunicatorLayer,
    CommunicatorPhase,
    Conflict,
    Plugin,
    Sections,
    hookimpl,
)
from drivetrain_communication.compress.section import PATH, CompressSection

if TYPE_CHECKING:
    from drivetrain.contracts import BucketSpec, StateHome, StateReader, StateWriter
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain_communication.compress.communicator import Compressed

_TWICE = "both quantise the same numbers, so errors would add up; leave one of them out"


class Compress(Plugin):
    """Owns ``communication.compress``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: CompressSection}

    @property
    def config(self) -> CompressSection:
        """The section."""
        return self.section(CompressSection)

    def enabled(self) -> bool:
        return any(value is not None for value in dict(self.config).values())

    def features(self) -> Mapping[str, object]:
        chosen = dict(self.config).items()
        return {f"{PATH}.{purpose}": how.method for purpose, how in chosen if how is not None}

    def conflicts(self) -> Sequence[Conflict]:
        gradients, weights, zero = f"{PATH}.gradients", f"{PATH}.weights", "zero_optimization"
        return [
            Conflict(gradients, None, f"{zero}.zero_quantized_gradients", True, _TWICE),
            Conflict(
                weights,
                None,
                f"{zero}.stage",
                None,
                "ranks would lose the exact values of shards that they gather and write back; "
                "zero_quantized_weights keeps them",
            ),
        ]

    @hookimpl
    def wrap_communicator(self, job: Job) -> Sequence[CommunicatorLayer]:
        from drivetrain_communication.compress.communicator import Compressed

        def wrap(inner: Communicator) -> Communicator:
            layers[job] = Compressed(inner, self.config)
            return layers[job]

        return (CommunicatorLayer(CommunicatorPhase.COMPRESS, wrap),)

    @hookimpl
    def place_state(self, job: Job, specs: Sequence[BucketSpec]) -> Sequence[StateHome] | None:
        """Learn which matrices lie in a bucket; others decide where states live."""
        if job in layers:
            layers[job].learn(specs)
        return None

    @hookimpl
    def save_state(self, engine: Engine, writer: StateWriter) -> None:
        if engine.job in layers:
            layers[engine.job].errors.save(writer)

    @hookimpl
    def load_state(self, engine: Engine, reader: StateReader) -> None:
        if engine.job in layers:
            layers[engine.job].errors.load(reader)


layers: WeakKeyDictionary[Job, Compressed] = WeakKeyDictionary()
"""The layer of each open job."""
