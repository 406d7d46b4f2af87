"""Layers around attention: their order, how models reach them, and what the innermost computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.contracts import (
    Attention,
    AttentionFacts,
    AttentionLayer,
    AttentionPhase,
    MaskRule,
    Plugin,
    Section,
    Sections,
    hookimpl,
)
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.job.job import Job
from drivetrain.plan.registry import Registry, core_entries

CONFIG = {"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "notes": {}}


class Notes(Plugin):
    """Notes which layers are entered, and what with; the innermost halves every result."""

    name = "notes"
    sections: ClassVar[Sections] = {"notes": Section}
    seen: ClassVar[list[tuple[str, AttentionFacts]]] = []
    phases: ClassVar[tuple[AttentionPhase, ...]] = (AttentionPhase.HEADS, AttentionPhase.KERNEL)

    @hookimpl
    def wrap_attention(self, job: Job) -> Sequence[AttentionLayer]:
        return [AttentionLayer(phase, self.noting(phase)) for phase in self.phases]

    def noting(self, phase: AttentionPhase) -> Any:
        def wrap(inner: Attention) -> Attention:
            def noted(module: nn.Module, q: Any, k: Any, v: Any, facts: AttentionFacts) -> Any:
                self.seen.append((phase.name, facts))
                output = inner(module, q, k, v, replace(facts))
                return output / 2 if phase is AttentionPhase.KERNEL else output

            return noted

        return wrap


class Own(nn.Module):
    """A model of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.width = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.width(x).unflatten(-1, (2, 2)).transpose(1, 2)
        return drivetrain.attention(self, y, y, y, causal=True).flatten(2)


def engine_of(module: nn.Module) -> drivetrain.Engine:
    Notes.seen.clear()
    registry = Registry(core_entries()).with_plugins(Notes)
    engine, *_ = drivetrain.initialize(model=module, config=CONFIG, registry=registry)
    return engine


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, **facts: Any
) -> torch.Tensor:
    """Attention by its formula, all in one."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if cap := facts.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    if (slopes := facts.get("slopes")) is not None:
        places = torch.arange(scores.shape[-1])
        scores = scores - slopes[:, None, None] * (places[:, None] - places).abs()
    weights = (scores + facts.get("bias", 0)).masked_fill(~allowed, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if (sinks := facts.get("sinks")) is not None:
        total = total + sinks[None, :, None, None].exp()
    return (weights / total @ v).transpose(1, 2)


def test_layers_are_entered_from_the_outside_in_and_left_when_the_engine_is_destroyed() -> None:
    module = Own()
    x = torch.randn(2, 5, 4)
    plain = module(x)
    engine = engine_of(module)
    assert torch.equal(engine(x), plain / 2)
    assert [name for name, _ in Notes.seen] == ["HEADS", "KERNEL"]
    assert Notes.seen[0][1].causal
    engine.destroy()
    assert torch.equal(module(x), plain)
    assert len(Notes.seen) == 2


FACTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": 3},
    "causal window": {"causal": True, "window": 3},
    "segments": {"segments": torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1]])},
    "causal mask": {"causal": True, "mask": torch.arange(7)[None, None, None] != 2},
    "causal bias": {"causal": True, "bias": randn(1, 4, 7, 7)},
    "softcap": {"causal": True, "softcap": 1.5},
    "sinks": {"window": 2, "sinks": randn(4)},
    "slopes": {"slopes": randn(4)},
    "causal slopes": {"causal": True, "slopes": randn(4), "window": 3},
}


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("name", FACTS)
def test_the_innermost_computes_the_formula(name: str, key_heads: int) -> None:
    facts = dict(FACTS[name])
    q, k, v = randn(2, 4, 7, 8), randn(2, key_heads, 7, 8) + 0.1, randn(2, key_heads, 7, 8) - 0.1
    ahead = torch.arange(7)[:, None] - torch.arange(7)
    allowed = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    if facts.get("causal"):
        allowed &= ahead >= 0
    if "window" in facts:
        allowed &= ahead.abs() < facts["window"]
    if "segments" in facts:
        segments = facts["segments"]
        allowed &= (segments[:, :, None] == segments[:, None])[:, None]
    if "mask" in facts:
        allowed = allowed & facts["mask"]
    found = drivetrain.attention(nn.Identity(), q, k, v, **facts)
    torch.testing.assert_close(found, by_hand(q, k, v, allowed, **facts), rtol=1e-12, atol=1e-12)


def test_segments_of_queries_say_nothing_about_other_keys() -> None:
    q, k = randn(1, 2, 3, 4), randn(1, 2, 5, 4)
    with pytest.raises(TrainingError, match="segments of 3 queries"):
        drivetrain.attention(nn.Identity(), q, k, k, segments=torch.zeros(1, 3))


def tiny(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "intermediate_size": 24}
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4)
        return transformers.GPT2LMHeadModel(config).double().eval()
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**common)).double().eval()
    if name == "mistral":
        config = transformers.MistralConfig(**common, num_key_value_heads=2, sliding_window=3)
        return transformers.MistralForCausalLM(config).double().eval()
    config = transformers.LlamaConfig(**common, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bert"])
def test_a_model_of_transformers_attends_through_the_layers_with_its_own_masks(name: str) -> None:
    model = tiny(name)
    own = model.config._attn_implementation
    tokens = torch.arange(20).view(2, 10)
    padded = torch.ones(2, 10, dtype=torch.long)
    padded[1, :4] = 0
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] * 2)
    cases: list[dict[str, Any]] = [{}, {"attention_mask": padded}]
    if name in ("llama", "mistral"):
        cases.append({"position_ids": packed, "use_cache": False})
    plain = [model(tokens, **case).logits for case in cases]
    Notes.phases = (AttentionPhase.HEADS,)
    engine = engine_of(model)
    try:
        for case, expected in zip(cases, plain, strict=True):
            found = engine(tokens, **case).logits
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        facts = [facts for _, facts in Notes.seen]
        assert len(facts) == 2 * len(cases)
        rule = facts[2].mask
        assert isinstance(rule, MaskRule)
        assert rule.padding is not None
        assert rule.padding.shape == (2, 10)
        assert facts[3].mask is rule  # so that the tensor is made once
        assert facts[0].causal == (name != "bert")
    finally:
        engine.destroy()
        Notes.phases = (AttentionPhase.HEADS, AttentionPhase.KERNEL)
    assert model.config._attn_implementation == own
    torch.testing.assert_close(model(tokens).logits, plain[0])


def test_a_model_that_attends_by_itself_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("gpt2")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation_cached_value", False)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel computes attention without"):
        engine_of(model)
    assert model.config._attn_implementation == "sdpa"
