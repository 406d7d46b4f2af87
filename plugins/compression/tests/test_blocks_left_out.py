"""Blocks are left out by weights and gradients of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_models import batches, net
from drivetrain_compression.pruned.blocks import BlockPruning, BlockPruningConfig
from test_smaller_in_training import engine_of

from drivetrain.errors import ConfigError


def section(**shared: Any) -> dict[str, Any]:
    base = {"enabled": True, "method": "snip_momentum", "excluded_modules": ["head"]}
    return {"sparse_pruning": {"shared_parameters": {**base, **shared}}}


def masks(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: b for n, b in model.named_buffers() if n.endswith("block_pruning_mask")}


def test_blocks_are_the_most_sensitive_of_all_weights_together() -> None:
    config = section(
        schedule_offset=0, schedule_offset_end=4, schedule_offset_stride=2, dense_ratio=0.25
    )
    engine, reference = engine_of(config), net()
    names = [n for n, m in reference.named_modules() if isinstance(m, torch.nn.Linear)]
    names.remove("head")
    momentum = dict.fromkeys(names, torch.zeros(()))
    kept = {n: torch.ones_like(reference.get_submodule(n).weight) for n in names}
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.3)

    def choose(step: int) -> None:
        sparsity = 0.75 * (1 - (1 - step / 4) ** 3)
        scores = {}
        for name in names:
            weight = reference.get_submodule(name).weight.detach().abs().float()
            own = weight * momentum[name] if step else weight
            scores[name] = own.unfold(0, 4, 4).mean(-1)  # blocks of 4 outputs, 1 input
        flat = torch.cat([s.flatten() for s in scores.values()])
        count = -int(-(1 - sparsity) * len(flat) // 1)
        limit = flat.sort(descending=True).values[count - 1]
        for name, score in scores.items():
            kept[name] = (score >= limit).double().repeat_interleave(4, 0)

    from torch.func import functional_call

    for step, (tokens, targets) in enumerate(batches(6)):
        if step in (0, 2, 4):
            choose(step)
        shown = {
            n: p * kept[n[:-7]] if n.endswith(".weight") and n[:-7] in kept else p
            for n, p in reference.named_parameters()
        }
        loss = functional_call(reference, shown, (tokens, targets))
        optimizer.zero_grad()
        loss.backward()
        for name in names:
            grad = reference.get_submodule(name).weight.grad
            assert grad is not None
            momentum[name] = 0.9 * momentum[name] + grad.abs().float()
        optimizer.step()
        found = engine(tokens, targets)
        engine.backward(found)
        engine.step()
        assert found.item() == pytest.approx(loss.item(), rel=1e-12), step
    found_masks = masks(engine.module)
    assert len(found_masks) == len(names)
    total = sum(int(m.sum()) for m in found_masks.values())
    assert total / sum(m.numel() for m in found_masks.values()) == pytest.approx(0.25, abs=0.01)


def test_two_of_four_inputs_are_zero_in_every_group() -> None:
    engine = engine_of(section(schedule_offset=1, block_pattern="2:4"))
    for tokens, targets in batches(3):
        engine.backward(engine(tokens, targets))
        engine.step()
    for name, mask in masks(engine.module).items():
        assert (mask.view(-1, 4).sum(1) == 2).all(), name


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (
            {"block_pattern": "4x3"},
            r"weight \[8, 8\] is not divided by the pattern 4x3; nothing is",
        ),
        ({"block_pattern": "4:4"}, "block_pattern 4:4 leaves no weight out of 4"),
        ({"schedule_offset": 5, "schedule_offset_end": 2}, "schedule_offset_end 2 is before"),
        ({"dense_ratio": 1.0}, "dense_ratio"),
        ({"block_pattern": "four"}, "block_pattern"),
    ],
)
def test_patterns_that_cannot_be_are_refused(shared: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_of(section(**shared))


def test_zeros_grow_by_the_cube_of_what_is_left() -> None:
    config = BlockPruningConfig(schedule_offset=10, schedule_offset_end=30, dense_ratio=0.2)
    modifier = BlockPruning(config, "blocks")
    wanted = [0.8 * (1 - (1 - k / 20) ** 3) for k in range(21)]
    assert [modifier.sparsity(10 + k) for k in range(21)] == pytest.approx(wanted, rel=1e-12)
