"""ZeroQuant's layer-by-layer distillation against the same steps by hand."""

from __future__ import annotations

import copy

import torch
from drivetrain_compression import compress_module
from drivetrain_compression.calibrated.grids import Integers, fit, round_to, weight_of
from tiny_models import Chain, rows
from torch import nn

RATE, STEPS = 3e-3, 9


def near(weight):
    scales = fit(weight.detach(), Integers(3), 0)
    return (
        weight
        + (weight_of(round_to(weight.detach(), Integers(3), scales), scales) - weight).detach()
    )


def through(x):
    top = x.abs().amax(-1, keepdim=True) / 127.5
    return x + (torch.round(x / top).clamp(-128, 127) * top - x).detach()


def student(block, x):
    up = nn.functional.linear(through(block.norm(x)), near(block.up.weight), block.up.bias)
    down = nn.functional.linear(through(up.relu()), near(block.down.weight), block.down.bias)
    return x + down


def test_a_block_learns_its_outputs_by_these_steps():
    model, data = Chain(depth=2), rows()
    wanted, start = copy.deepcopy(model), copy.deepcopy(model)
    config = {"bits": 3, "activations": "int8", "steps": STEPS, "learning_rate": RATE}
    compress_module(model, {"modifiers": [{"zeroquant": config}]}, data)
    hidden = [wanted.embed(ids).detach() for ids in data]
    for block in wanted.layers:
        teacher = [block(x).detach() for x in hidden]
        optimizer = torch.optim.AdamW(block.parameters(), lr=RATE)
        for step in range(STEPS):
            at = step % len(hidden)
            nn.functional.mse_loss(student(block, hidden[at]), teacher[at]).backward()
            optimizer.step()
            optimizer.zero_grad()
        hidden = [student(block, x).detach() for x in hidden]
        for layer in (block.up, block.down):
            layer.weight.data.copy_(near(layer.weight))
    for (name, mine), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=name)
    moved = (model.layers[0].norm.weight - start.layers[0].norm.weight).abs().max()
    assert moved > RATE  # norms learn, too


def test_distillation_is_nearer_to_the_original_than_rounding():
    data = rows(12)
    original, plain, learnt = Chain(), Chain(), Chain()
    compress_module(plain, {"modifiers": [{"round": {"bits": 3}}]}, data)
    config = {"bits": 3, "steps": 200, "learning_rate": 5e-3}
    compress_module(learnt, {"modifiers": [{"zeroquant": config}]}, data)
    held = rows(4, seed=5)[0]
    far = [(m(held) - original(held)).norm() for m in (plain, learnt)]
    assert far[1] < 0.97 * far[0]
