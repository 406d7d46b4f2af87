"""Upcycled models train with experts on two ranks as one process does, and load on others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_moe import upcycle
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RATE, STEPS, EXPERTS = 0.1, 3, 4


def dense(kind: str) -> nn.Module:
    """The quickstart's GPT, or a Llama; with weights that are not zero."""
    torch.manual_seed(0)
    if kind == "gpt":
        sys.path.insert(0, str(EXAMPLES))
        try:
            from gpt import GPT
        finally:
            sys.path.remove(str(EXAMPLES))
        model: nn.Module = GPT(context=16, layers=2, width=16, heads=2)
    else:
        config = transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.double()


def upcycled(kind: str, ep: int = 1) -> nn.Module:
    model = dense(kind)
    plain: dict[str, Any] = {"top2_2nd_expert_sampling": False, "balance_loss": 0.0}
    # The second layer is wider in experts, and keeps its dense layer beside.
    found = upcycle(model, [EXPERTS, 0], ep_size=ep, reinitialise=0.5, **plain)
    found |= upcycle(model, 2 * EXPERTS, ep_size=ep, use_residual=True, **plain)
    assert [layer.num_experts for layer in found.values()] == [EXPERTS, 2 * EXPERTS]
    return model


def loss_of(model: Any, step: int, shard: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + shard)
    words = torch.randint(0, 256, (2, 13), generator=generator)
    out = model(words)
    logits = getattr(out, "logits", out)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())


def make(kind: str, ep: int, stage: int) -> Engine:
    return drivetrain.initialize(
        model=upcycled(kind, ep),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "zero_optimization": {"stage": stage},
        },
    )[0]


def train(kind: str, folder: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    engine, losses = make(kind, 2, 2), []
    for step in range(STEPS):
        loss = loss_of(engine, step, engine.job.rank)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.save_checkpoint(folder)
    state = state_of(engine)
    engine.destroy()
    return losses, state


def load(kind: str, folder: str) -> dict[str, torch.Tensor]:
    engine = make(kind, 1, 0)
    engine.load_checkpoint(folder)
    state = state_of(engine)
    engine.destroy()
    return state


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    with drivetrain.whole(engine.module):
        return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_upcycled_experts_on_two_ranks_train_as_one_process(kind: str, tmp_path: Path) -> None:
    model, expected = upcycled(kind), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        both = [loss_of(model, step, shard) for shard in range(2)]
        optimizer.zero_grad()
        torch.stack(both).mean().backward()
        optimizer.step()
        expected.append([loss.item() for loss in both])
    ranks = run_distributed(train, 2, kind, str(tmp_path))
    wanted = dict(model.named_parameters())
    for shard, (losses, state) in enumerate(ranks):
        assert losses == pytest.approx([both[shard] for both in expected], rel=1e-9)
        for name, value in state.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-8, atol=1e-10, msg=name)
    assert set(ranks[0][1]) | set(ranks[1][1]) == set(wanted)
    assert set(ranks[0][1]) != set(wanted)  # a rank had its own experts only
    (loaded,) = run_distributed(load, 1, kind, str(tmp_path))
    assert set(loaded) == set(wanted)
    for name, value in loaded.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-8, atol=1e-10, msg=name)
