"""Ranks with different heads agree on one number of blocks, and what a paged cache replaces."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from drivetrain_inference import serve
from drivetrain_inference.cache.paged import LayerSpec
from drivetrain_inference.cache.room import Room, agreement
from drivetrain_inference.models.shared import SharedTokens
from drivetrain_inference.plugin import Inference
from drivetrain_inference.section import InferenceSection
from tiny_decoders import decoder

from drivetrain.contracts import (
    AttentionLayer,
    AttentionPhase,
    Op,
    Plugin,
    Section,
    Sections,
)
from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry, core_entries

SECTION = InferenceSection(block_size=8, cache_bytes=2**16, host_cache_bytes=2**15)


class Ranks:
    """A communicator whose other rank along each axis has numbers that are known."""

    def __init__(self, **others: list[int]) -> None:
        self.others, self.seen = others, list[tuple[str, Op]]()

    def all_reduce(self, tensor: torch.Tensor, axis: str, tag: Any, *, op: Op) -> None:
        self.seen.append((axis, op))
        tensor.copy_(torch.minimum(tensor, torch.tensor(self.others[axis])))


def job_of(ranks: Ranks, **sizes: int) -> Any:
    mesh = SimpleNamespace(size=lambda axis: sizes.get(axis, 1))
    return SimpleNamespace(mesh=mesh, device=torch.device("cpu"), communicator=ranks)


def room_of(heads: int, job: Any) -> Room:
    layers = [LayerSpec(heads, 8, 8, 1.0, 0, 0.0)] * 2
    return Room.of(SECTION, 10_000, layers, torch.float32, agreement(job))


def test_ranks_with_fewer_heads_take_no_more_blocks_than_the_others() -> None:
    alone = Ranks()
    few, many = (room_of(heads, job_of(alone)) for heads in (1, 2))
    assert not alone.seen
    assert (few.blocks, few.host) == (2 * many.blocks, 2 * many.host) == (64, 32)
    for axis in ("sp", "tp"):
        ranks = Ranks(**{axis: [many.blocks, many.host]})
        assert room_of(1, job_of(ranks, **{axis: 2})) == many
        assert ranks.seen == [(axis, Op.MIN)]


def test_a_cache_that_is_too_small_on_one_rank_is_refused_on_all() -> None:
    with pytest.raises(ConfigError, match="less than two blocks"):
        room_of(1, job_of(Ranks(sp=[1, 0]), sp=2))


@pytest.mark.parametrize("phase", [AttentionPhase.KERNEL, AttentionPhase.MASK])
def test_layers_that_change_attention_are_refused_by_name(phase: AttentionPhase) -> None:
    job = job_of(Ranks())
    job.hub = SimpleNamespace(
        wrap_attention=lambda job: [AttentionLayer(phase, lambda inner: inner)]
    )
    with pytest.raises(ConfigError, match=rf"{__name__} changes what attention computes"):
        SharedTokens.of(job)
    job.hub.wrap_attention = lambda job: []
    assert SharedTokens.of(job) is None


class Sparse(Plugin):
    """Says of itself what the plugin of sparse attention says."""

    name = "sparse_attention"
    sections: ClassVar[Sections] = {"sparse_attention": Section}
    mode = "fixed"

    def features(self) -> dict[str, object]:
        return {"sparse_attention.mode": self.mode}


def test_sparse_attention_is_refused_before_anything_is_built() -> None:
    registry = Registry(core_entries()).with_plugins(Inference, Sparse)
    config: dict[str, Any] = {"inference": {}, "sparse_attention": {}}
    with pytest.raises(ConfigError, match=r"inference: sparse_attention\.mode is 'fixed'"):
        Plan.build(config, batch_required=False, registry=registry)
    Sparse.mode = "dense"
    Plan.build(config, batch_required=False, registry=registry)


def test_tokens_that_end_a_text_are_read_where_weights_come_from_elsewhere(tmp_path: Any) -> None:
    model: Any = decoder()
    model.generation_config.eos_token_id = [5, 77]
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    with serve(tmp_path, {"inference": {"max_context": 32}}, weights=weights) as engine:
        assert engine.stop_tokens == {5, 77}
