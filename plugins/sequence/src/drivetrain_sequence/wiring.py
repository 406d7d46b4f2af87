"""Where a job's parts meet: its layers of attention, its module and its batches."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn

from drivetrain.contracts import Attention, AttentionLayer, AttentionPhase, Phase, Transform
from drivetrain.errors import ConfigError
from drivetrain.states.units import units
from drivetrain_sequence.layout import Cut
from drivetrain_sequence.model import SharedModel
from drivetrain_sequence.ring import Ring, pass_keys_on
from drivetrain_sequence.tiles import TiledModule, mlps
from drivetrain_sequence.turn import Turn
from drivetrain_sequence.ulysses import exchange_heads, heads_line, ring_line

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain_sequence.section import SequenceParallelSection

_turns: WeakKeyDictionary[Job, Turn] = WeakKeyDictionary()
_shared: WeakKeyDictionary[nn.Module, SharedModel] = WeakKeyDictionary()


def cut_of(job: Job, section: SequenceParallelSection) -> Cut:
    """How the ranks of a sequence share it out; not at all where the script does."""
    if "sp" in job.plan.serves_axes:
        return Cut(1)
    return Cut(job.mesh.size("sp") // section.ring_size, section.ring_size)


def attention_layers(job: Job, section: SequenceParallelSection) -> list[AttentionLayer]:
    """The layers around attention, from the inside out."""
    cut = cut_of(job, section)
    if cut.ranks == 1:
        return []
    turn = _turns.setdefault(job, Turn())
    line = heads_line(job, cut) if cut.heads > 1 else None
    ring = Ring(ring_line(job, cut), cut)

    def shared(inner: Attention) -> Attention:
        by_blocks = pass_keys_on(inner, ring, turn)
        if line is None:
            return by_blocks
        return exchange_heads(inner, by_blocks, line, turn, in_ring=cut.ring > 1)

    return [AttentionLayer(AttentionPhase.SEQUENCE, shared)]


def transforms(job: Job, section: SequenceParallelSection) -> list[Transform]:
    """What is done to the module: tiles inside of it, and hooks around it."""

    def in_tiles(module: nn.Module) -> nn.Module:
        if section.mlp_tile is not None:
            found = [part for unit in units(module) for part in mlps(unit.module)]
            if not found:
                raise ConfigError(
                    f"sequence_parallel.mlp_tile: {type(module).__name__} has no multi-layer "
                    "perceptron among the children of its repeated blocks"
                )
            for part in found:
                job.on_close(TiledModule(part, section.mlp_tile).undo)
        return module

    def share(module: nn.Module) -> nn.Module:
        cut = cut_of(job, section)
        if cut.ranks > 1 or section.loss_tile is not None:
            turn = _turns.setdefault(job, Turn())
            _shared[module] = SharedModel(job, module, section, cut, turn)
            job.on_close(_shared[module].undo)
        return module

    return [Transform(Phase.RECOMPUTE, in_tiles), Transform(Phase.SURROUND, share)]


def shared_model(engine: Engine) -> SharedModel | None:
    """What prepares the batches of an engine, if they have to be."""
    return _shared.get(engine.module)
