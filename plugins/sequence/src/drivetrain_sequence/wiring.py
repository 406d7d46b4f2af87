"""Where a job's parts meet: its layers of attention, its module and its batches."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from drivetrain.contracts import (
    Attention,
    AttentionFacts,
    AttentionLayer,
    AttentionPhase,
    Phase,
    Transform,
)
from drivetrain.errors import ConfigError
from drivetrain.modules.attention import torch_attention
from drivetrain.states.units import units
from drivetrain_sequence.chunks.block import ChunkedBlock
from drivetrain_sequence.chunks.layer import attend_by_chunks
from drivetrain_sequence.inputs import is_of_transformers, without_cache
from drivetrain_sequence.layout import Cut
from drivetrain_sequence.model import SharedModel
from drivetrain_sequence.ring import Ring, pass_keys_on
from drivetrain_sequence.section import PATH
from drivetrain_sequence.tiles import TiledModule, tiled_modules
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
        if section.chunk is not None:
            raise ConfigError(
                f"{PATH}.chunk: the script shares sequences out by itself (mpu), so nothing is "
                "known of the order of their tokens: leave it out"
            )
        return Cut(1)
    return Cut(job.mesh.size("sp") // section.ring_size, section.ring_size, section.chunk)


def turn_of(job: Job, section: SequenceParallelSection) -> Turn:
    """What tells the job's layers whether tokens are in parts."""
    if job not in _turns:
        _turns[job] = Turn(cut_of(job, section))
    return _turns[job]


def attention_layers(job: Job, section: SequenceParallelSection) -> list[AttentionLayer]:
    """The layers around attention, from the inside out."""
    turn = turn_of(job, section)
    cut = turn.cut
    if not cut.cuts:
        return []
    ring = Ring(ring_line(job, cut), cut)
    line = heads_line(job, cut) if cut.heads > 1 or cut.chunk is not None else None

    def shared(inner: Attention) -> Attention:
        if (cut.ring > 1 or cut.chunk is not None) and inner is not torch_attention:
            key = "ring_size: ranks of a ring" if cut.ring > 1 else "chunk: blocks in chunks"
            raise ConfigError(
                f"{PATH}.{key} compute attention themselves, so no other section of the config can "
                "change how it is computed: leave out that section (sparse_attention and inference "
                "are such), or this key"
            )
        by_blocks = pass_keys_on(inner, ring, turn)
        if line is None:
            return noted(by_blocks, turn)
        chunks = attend_by_chunks(turn)
        return noted(exchange_heads(inner, by_blocks, chunks, line, turn), turn)

    return [AttentionLayer(AttentionPhase.SEQUENCE, shared)]


def noted(attention: Attention, turn: Turn) -> Attention:
    """``attention``, which says who calls it while that is asked, and is told of shared towers."""

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        facts: AttentionFacts,
    ) -> torch.Tensor:
        if turn.asked is not None:
            turn.asked.add(module)
        if module in turn.stacks:
            facts = turn.stacks[module].facts(module, query, facts)
        return attention(module, query, key, value, facts)

    return attend


def transforms(job: Job, section: SequenceParallelSection) -> list[Transform]:
    """What is done to the module: tiles and chunks inside of it, and hooks around it."""

    def in_tiles(module: nn.Module) -> nn.Module:
        blocks = [unit for unit in units(module) if unit.module is not module]
        for part, (tile, asked) in tiled_modules(job, module, section).items():
            job.on_close(TiledModule(part, tile, asked).undo)
        if section.chunk is not None:
            if not blocks:
                raise ConfigError(
                    f"{PATH}.chunk: {type(module).__name__} has no repeated blocks (children of "
                    "one class in a ModuleList, Sequential or ModuleDict) to compute in chunks"
                )
            for unit in blocks:
                turn = turn_of(job, section)
                job.on_close(ChunkedBlock(job, unit, turn, section.chunk_offload).undo)
        return module

    def share(module: nn.Module) -> nn.Module:
        turn = turn_of(job, section)
        if turn.cut.cuts or section.loss_tile is not None:
            _shared[module] = SharedModel(job, module, section, turn)
            job.on_close(_shared[module].undo)
        return module

    return [Transform(Phase.RECOMPUTE, in_tiles), Transform(Phase.SURROUND, share)]


def prepared(
    engine: Engine, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one forward: cut, or at least the same as those that are."""
    model = _shared.get(engine.module)
    if model is not None:
        return model.prepare(engine, args, kwargs)
    if not is_of_transformers(engine.module):
        return args, dict(kwargs)
    signature = inspect.signature(engine.module.forward)
    named = signature.bind_partial(*args, **kwargs).arguments
    return args, without_cache(signature, kwargs, named)
