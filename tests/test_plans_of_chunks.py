"""A rehearsal runs chunks of a sequence that are alike once, and foretells what all of them do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from drivetrain_cli.memory import Ranks
from drivetrain_cli.planning.operators import Operators
from drivetrain_cli.planning.price import flops_of
from drivetrain_cli.planning.rehearsed import Rehearsed, rehearse
from drivetrain_cli.planning.subject import Subject
from drivetrain_cli.stand_in import without_memory
from drivetrain_sequence.chunks import block

TOKENS, CHUNK = 96, 8


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=TOKENS,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def planned() -> Rehearsed:
    def inputs(samples: int, tokens: int) -> dict[str, Any]:
        ids = torch.zeros(samples, tokens, dtype=torch.int64)
        return {"input_ids": ids, "labels": ids.clone()}

    subject = Subject(lambda: without_memory(llama, "llama"), "llama", TOKENS, inputs, [])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "bf16": {"enabled": True},
        "sequence_parallel": {"chunk": CHUNK, "loss_tile": 16},
    }
    return rehearse(config, subject, Ranks(1, 1, False))


def calls(found: Rehearsed) -> Mapping[str, int]:
    return {each.signature: each.calls.total() for each in found.operators.found.values()}


def test_chunks_that_are_alike_run_once_and_count_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran, note = [0], Operators.note

    def noted(*args: Any) -> None:
        ran[0] += 1
        note(*args)

    monkeypatch.setattr(Operators, "note", noted)
    short, of_short = planned(), ran[0]
    monkeypatch.setattr(block, "is_rehearsed", lambda device: False)
    whole, of_whole = planned(), ran[0] - of_short
    assert of_short < 0.5 * of_whole
    assert flops_of(short) == flops_of(whole) > 0
    one, other = calls(short), calls(whole)
    products = [name for name in other if "attention" in name or ".mm." in name]
    assert products
    assert {name: one[name] for name in products} == {name: other[name] for name in products}
    assert sum(one.values()) == pytest.approx(sum(other.values()), rel=0.01)
    for place in ("device", "host"):
        assert short.peak(place) == whole.peak(place) > 0
