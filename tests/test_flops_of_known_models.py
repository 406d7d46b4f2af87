"""Operations of well-known models are what one counts by hand, however they are shared out."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import pytest
import torch
from drivetrain_profiler import FlopsProfiler, get_model_profile
from drivetrain_profiler.measured import figures
from drivetrain_profiler.plugin import _profiles
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import drivetrain
from drivetrain.testing import run_distributed

ROWS, LENGTH, WIDTH, INNER, LAYERS, HEADS, KV, WORDS = 2, 16, 32, 48, 2, 4, 2, 64
HEAD = WIDTH // HEADS
TOKENS = ROWS * LENGTH
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": WORDS,
}

SCORES = LAYERS * ROWS * HEADS * 2 * LENGTH * LENGTH * HEAD
"""MACs of scores and of the sums of values, of all heads."""

PROJECTIONS = LAYERS * TOKENS * (2 * WIDTH * WIDTH + 2 * WIDTH * KV * HEAD)
GATED = LAYERS * TOKENS * 3 * WIDTH * INNER
BY_HAND = {
    "llama": PROJECTIONS + GATED + SCORES + TOKENS * WIDTH * WORDS,
    "bert": LAYERS * TOKENS * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER) + SCORES + ROWS * WIDTH**2,
    "mixtral": (
        PROJECTIONS + 2 * GATED + SCORES + LAYERS * TOKENS * WIDTH * 4 + TOKENS * WIDTH * WORDS
    ),
    "cnn": ROWS * (16 * 16 * 8 * 3 * 9 + 8 * 8 * 16 * 8 * 9 + 16 * 10),
}
"""MACs of a forward: each weight of a product once per token, an expert's per token it is given."""


class Cnn(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
        )


def model(name: str, attention: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    if name == "cnn":
        return Cnn()
    if name == "bert":
        return BertModel(BertConfig(**SIZES, attn_implementation=attention))
    sizes = {**SIZES, "num_key_value_heads": KV, "attn_implementation": attention}
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **experts))


def inputs(name: str) -> dict[str, torch.Tensor]:
    if name == "cnn":
        return {"input": torch.ones(ROWS, 3, 16, 16)}
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(0, WORDS, (ROWS, LENGTH), generator=generator)}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", BY_HAND)
def test_a_model_is_counted_as_by_hand(name: str, attention: str) -> None:
    found = get_model_profile(
        model(name, attention).eval(),
        kwargs=inputs(name),
        as_string=False,
        print_profile=False,
    )
    assert found[1] == BY_HAND[name]
    assert found[0] > 2 * BY_HAND[name]  # what works element by element, too
    assert found[2] == sum(p.numel() for p in model(name).parameters())


def trained(name: str, keys: dict[str, Any]) -> tuple[int, int, int]:
    """MACs of one rank in forward, backward and computed again."""
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": "/dev/null"},
        **keys,
    }
    engine = drivetrain.initialize(model=model(name), config=config)[0]
    for _ in range(2):
        output = engine(**inputs(name))
        output = output if name == "cnn" else output[0]
        engine.backward(output.square().mean())
        engine.step()
    profile = _profiles[engine]
    found = figures(engine.module, profile._counter, profile._timer)
    engine.job.close()
    return found.forward.macs, found.backward.macs, found.recompute.macs


ZERO = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


@pytest.mark.parametrize("name", BY_HAND)
def test_each_rank_of_zero_counts_all_of_its_micro_batch(name: str) -> None:
    hand = BY_HAND[name]
    first = ROWS * 16 * 16 * 8 * 3 * 9 if name == "cnn" else 0  # nobody wants its input's gradient
    unused = ROWS * WIDTH**2 if name == "bert" else 0  # the pooler, whose output has no loss
    for forward, backward, again in run_distributed(trained, 2, name, ZERO):
        assert forward == hand
        assert backward == 2 * (hand - unused) - first
        assert again == 0


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral"])
def test_ranks_of_one_tensor_axis_count_the_model_together(name: str) -> None:
    """What is not cut (routers and experts, a pooler) each rank computes, and counts, by itself."""
    experts = LAYERS * TOKENS * WIDTH * 4 + 2 * GATED
    twice = {"mixtral": experts, "bert": ROWS * WIDTH**2}.get(name, 0)
    unused = 2 * ROWS * WIDTH**2 if name == "bert" else 0  # no loss comes from the pooler
    ranks = run_distributed(trained, 2, name, {"tensor_parallel": {"autotp_size": 2}})
    forward, backward, again = (sum(which) for which in zip(*ranks, strict=True))
    assert forward == BY_HAND[name] + twice
    assert backward == 2 * (forward - unused)
    assert again == 0
    assert ranks[0] == ranks[1]


class Takes(nn.Module):
    """Takes as many seconds as it says, by a clock that goes on nowhere else."""

    def __init__(self, now: list[float], seconds: float) -> None:
        super().__init__()
        self.now, self.seconds = now, seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.now[0] += self.seconds
        return x


def test_times_of_modules_add_up_to_the_one_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    inner = nn.Sequential(Takes(now, 0.05), Takes(now, 0.1))
    whole = nn.Sequential(inner, Takes(now, 0.15), Takes(now, 0.2))
    profiler = FlopsProfiler(whole)
    profiler.start_profile()
    whole(torch.ones(1))
    profiler.stop_profile()
    seconds = profiler.timer.seconds
    assert seconds[""] == pytest.approx(0.5)
    assert sum(seconds[name] for name in "012") == pytest.approx(seconds[""])
    assert seconds["0.0"] + seconds["0.1"] == pytest.approx(seconds["0"]) == pytest.approx(0.15)


def test_what_hooks_themselves_take_is_less_than_2_percent() -> None:
    """Of work that is: products of matrices, by the processor's clock in place of the wall's."""
    parts = [nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))) for _ in range(4)]
    whole = nn.Sequential(*parts)
    shares = []
    for _ in range(5):
        profiler = FlopsProfiler(whole)
        with patch.object(time, "perf_counter", time.process_time):
            profiler.start_profile(count=False)
            whole(torch.ones(512, 512))
            profiler.stop_profile()
        seconds = profiler.timer.seconds
        shares.append(sum(seconds[f"{n}"] for n in range(4)) / seconds[""])
    assert max(shares) == pytest.approx(1, rel=0.02)
