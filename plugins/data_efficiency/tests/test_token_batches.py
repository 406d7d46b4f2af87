"""Micro-batches by tokens: what is in them, on any ranks, the rate, and packed rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drivetrain_data_efficiency import Analyzer, DataEfficiency, length
from drivetrain_data_efficiency.sampling.packing import (
    checked_for_packing,
    divide,
    pack_samples,
    scale_rate,
    segments,
)
from drivetrain_data_efficiency.sampling.token_batches import TokenBatches
from drivetrain_data_efficiency.section import DynamicBatchingSection
from torch import nn

import drivetrain
from drivetrain.contracts import LoaderRequest
from drivetrain.engine.loader import DataLoader
from drivetrain.errors import CheckpointError, ConfigError
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed

LENGTHS = np.random.default_rng(0).integers(1, 20, 300)


class Rows:
    """Rows of tokens; the first is the row's number."""

    def __init__(self, lengths: Any = LENGTHS, told: bool = True) -> None:
        self.rows = [torch.full((int(n),), 1) for n in lengths]
        for number, row in enumerate(self.rows):
            row[0] = number
        if told:
            self.lengths = lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


def section(**keys: Any) -> DynamicBatchingSection:
    return DynamicBatchingSection.model_validate({"enabled": True, "max_tokens": 40, **keys})


def by_hand(lengths: Any, limit: int, smallest: int, largest: int | None, padded: bool) -> Any:
    """One sample at a time."""
    found, begin = [], 0
    while begin < len(lengths):
        end = begin
        while end < len(lengths) and (largest is None or end - begin < largest):
            own = lengths[begin : end + 1]
            if (max(own) * len(own) if padded else sum(own)) > limit:
                break
            end += 1
        if end - begin >= smallest:
            found.append([begin, end])
            begin = end
        else:
            begin += 1
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("smallest", "largest"), [(1, None), (1, 3), (3, None), (2, 4)])
def test_samples_are_divided_as_one_at_a_time(
    smallest: int, largest: int | None, padded: bool
) -> None:
    for limit in (19, 40, 77):
        found = divide(LENGTHS, limit, smallest=smallest, largest=largest, padded=padded)
        assert found.tolist() == by_hand(LENGTHS.tolist(), limit, smallest, largest, padded)


@pytest.mark.parametrize("order", ["dataloader", "random", "seqlen"])
def test_every_sample_that_fits_comes_once(order: str) -> None:
    batches = TokenBatches(LENGTHS, section(sequence_picking_order=order), per_step=1, seed=2)
    for epoch in (0, 1):
        items = list(batches.items(epoch, 0))
        samples = [sample for item in items for sample in item]
        assert sorted(samples) == list(range(300))
        assert all(LENGTHS[item].sum() <= 40 for item in map(list, items))
        assert len(batches) == len(items)
    first, again = (list(batches.items(epoch, 0)) for epoch in (0, 1))
    assert (first != again) == (order == "random")
    if order == "seqlen":
        assert [LENGTHS[s] for item in first for s in item] == sorted(LENGTHS)


def test_long_samples_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    batches = TokenBatches(LENGTHS, section(max_tokens=10), per_step=1, seed=2)
    samples = [sample for item in batches.items(0, 0) for sample in item]
    assert samples == [i for i, n in enumerate(LENGTHS) if n <= 10]
    assert f"{(LENGTHS > 10).sum()} of 300 samples have more than max_tokens" in caplog.text
    with pytest.raises(ConfigError, match="makes 0 micro-batches, and a step has 4"):
        TokenBatches(np.array([50, 60]), section(), per_step=4, seed=2)


def dealt(shards: int, rounds: int, state: Any = None, workers: int = 0) -> Any:
    order = TokenBatches(LENGTHS, section(sequence_picking_order="random"), per_step=4, seed=2)
    found = []
    loaders = [
        DataLoader(
            LoaderRequest(
                *(Rows(), 1),
                shard=shard,
                num_shards=shards,
                order=order,
                collate_fn=pack_samples,
                num_workers=workers,
            )
        )
        for shard in range(shards)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    passes = [iter(loader) for loader in loaders]
    for _ in range(rounds):
        for one in passes:
            packed = next(one)
            found.append(packed["input_ids"][packed["position_ids"] == 0].tolist())
    return found, loaders[0].state_dict()


def test_the_order_is_the_same_on_any_number_of_ranks_and_after_a_resume() -> None:
    whole, _ = dealt(1, 60)
    assert dealt(2, 30)[0] == dealt(4, 15)[0] == whole
    assert dealt(2, 30, workers=1)[0] == whole
    first, state = dealt(2, 8)
    assert first + dealt(4, 11, state)[0] == whole
    state["order"]["seed"] = 3
    with pytest.raises(CheckpointError, match="other samples would come"):
        dealt(1, 1, state)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[int] = []

    def forward(self, input_ids: torch.Tensor, position_ids: Any, labels: Any) -> torch.Tensor:
        self.seen.append(int((position_ids == 0).sum()))
        return self.weight.sum()


def start(dataset: Any, batching: dict[str, Any], model: Any = None, **keys: Any) -> Any:
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "data_efficiency": {
            "enabled": True,
            "data_sampling": {
                "enabled": True,
                "dynamic_batching": {"enabled": True, "max_tokens": 40, "pack": True, **batching},
            },
        },
        **keys,
    }
    engine, *_ = drivetrain.initialize(
        model=model or Model(),
        config=config,
        training_data=dataset,
        registry=Registry.installed().with_plugins(DataEfficiency),
    )
    return engine


def rates(method: str, base: int | None) -> Any:
    keys = {"lr_scaling_method": method, "sequence_picking_order": "seqlen"}
    engine = start(Rows(), {**keys, **({"base_batch_size": base} if base else {})})
    moved = []
    for _ in range(6):
        before = engine.module.weight.item()
        engine.train_batch()
        moved.append(before - engine.module.weight.item())
    assert [group["lr"] for group in engine.optimizer.param_groups] == [0.5]
    seen = engine.module.seen
    engine.destroy()
    return moved, seen


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("method", "power"), [("linear", 1.0), ("sqrt", 0.5), ("none", 0.0)])
def test_the_rate_follows_the_samples_of_the_step(world: int, method: str, power: float) -> None:
    answers = run_distributed(rates, world, method, 20)
    micro = 4 // world
    for step in range(6):
        samples = sum(sum(seen[step * micro : (step + 1) * micro]) for _, seen in answers)
        for moved, _ in answers:
            assert moved[step] == pytest.approx(0.5 * (samples / 20) ** power, rel=1e-5)


def test_by_default_the_rate_is_meant_for_the_mean() -> None:
    own = section(sequence_picking_order="seqlen")
    batches = TokenBatches(LENGTHS, own, per_step=4, seed=2)
    moved, seen = rates("linear", None)
    assert moved[0] == pytest.approx(0.5 * sum(seen[:4]) / batches.mean_samples, rel=1e-5)
    with pytest.raises(ConfigError, match="linear, sqrt or none"):
        scale_rate(1.0, 2, 1, "log")


def scheduled(folder: str, by: str, total: int, load: bool) -> list[float]:
    """How far each of three steps moves the weight, of a gradient of 1."""
    batching = {"lr_scaling_method": "none", "sequence_picking_order": "random"}
    rate = {"enabled": True, "by": by, "total": total, "warmup": total // 4, "decay_type": "linear"}
    sampling = {
        "enabled": True,
        "dynamic_batching": {"enabled": True, "max_tokens": 40, **batching},
    }
    sampling["dynamic_batching"]["pack"] = True
    keys = {"enabled": True, "data_sampling": sampling, "lr_schedule": rate}
    engine = start(Rows(), {}, data_efficiency=keys)
    if load:
        engine.load_checkpoint(folder)
    moved = []
    for _ in range(3):
        before = engine.module.weight.item()
        engine.train_batch()
        moved.append(before - engine.module.weight.item())
    engine.save_checkpoint(folder)
    engine.destroy()
    return moved


@pytest.mark.parametrize("by", ["steps", "samples", "tokens"])
def test_a_schedule_counts_steps_samples_or_tokens_of_all_ranks(tmp_path: Path, by: str) -> None:
    own = section(sequence_picking_order="random")
    batches = TokenBatches(LENGTHS, own, per_step=4, seed=1234)
    rows = list(batches.items(0, 0))
    steps = [[s for part in rows[first : first + 4] for s in part] for first in range(0, 24, 4)]
    counts = {"steps": lambda step: 1, "samples": len, "tokens": lambda s: int(LENGTHS[s].sum())}
    done, total, expected = 0, sum(counts[by](step) for step in steps), []
    warmup = total // 4
    for step in steps:
        part = done / warmup if done < warmup else 1 - (done - warmup) / (total - warmup)
        expected.append(0.5 * part)
        done += counts[by](step)
    first = run_distributed(scheduled, 2, str(tmp_path), by, total, False)
    [rest] = run_distributed(scheduled, 1, str(tmp_path), by, total, True)
    assert first[0] == first[1]
    assert first[0] + rest == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_lengths_come_from_the_analyzer_or_the_data_set(tmp_path: Path) -> None:
    Analyzer(Rows(), [length()], tmp_path, progress=False).run()
    engine = start(Rows(told=False), {"metrics_path": str(tmp_path)})
    engine.train_batch()
    engine.destroy()
    with pytest.raises(ConfigError, match="needs the samples' lengths: run `drivetrain data"):
        start(Rows(told=False), {})
    with pytest.raises(ConfigError, match=r"seqlen .* are of another data set"):
        start(Rows(LENGTHS + 1), {"metrics_path": str(tmp_path)})
    with pytest.raises(ConfigError, match="set train_micro_batch_size_per_gpu to 1"):
        start(Rows(), {}, train_micro_batch_size_per_gpu=2)


def test_a_packed_row_trains_as_its_samples_do_apart() -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(settings).double()
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM .*use_cache = False"):
        start(Rows(), {}, model=model)
    model.config.use_cache = False
    checked_for_packing(model)
    rows = [torch.randint(0, 40, (n,)) for n in (5, 9, 3)]
    packed = model(**pack_samples(rows))
    apart = [model(input_ids=row[None], labels=row[None]) for row in rows]
    logits = torch.cat([output.logits[0] for output in apart])
    torch.testing.assert_close(packed.logits[0], logits, rtol=1e-9, atol=1e-9)
    counts = [len(row) - 1 for row in rows]
    total = sum(n * output.loss for n, output in zip(counts, apart, strict=True)) / sum(counts)
    # Transformers computes losses in float32
    torch.testing.assert_close(packed.loss, total, rtol=1e-6, atol=0)


def test_segments_tell_drivetrains_attention_the_same() -> None:
    rows = [torch.arange(n) for n in (4, 6)]
    packed = pack_samples(rows)
    own = segments(packed["position_ids"])
    assert own.tolist() == [[0] * 4 + [1] * 6]
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 10, 8, dtype=torch.float64)
    whole = drivetrain.attention(nn.Identity(), q, k, v, causal=True, segments=own)
    parts = [
        drivetrain.attention(nn.Identity(), q[:, :, s], k[:, :, s], v[:, :, s], causal=True)
        for s in (slice(0, 4), slice(4, 10))
    ]
    torch.testing.assert_close(whole, torch.cat(parts, 1))


def test_contradictions_are_refused() -> None:
    for keys, message in (
        ({"max_tokens": None}, "needs max_tokens"),
        ({"min_batch_size": 4, "max_batch_size": 2}, "min_batch_size 4 is larger"),
        ({"pack": True, "pad": True}, "pack leaves no padding"),
    ):
        with pytest.raises(ValueError, match=message):
            section(**keys)
