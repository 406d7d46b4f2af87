"""Every pair of feature values either trains to the plain reference or is refused by name."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest
import torch
from gpt_with_experts import gpt_with_experts
from pairs import all_pairs
from torch import nn

import drivetrain
from drivetrain.contracts import Plugin
from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed
from drivetrain.testing.parts import SharedSequences

STEPS = 6
MICRO_BATCH = 2

ELSEWHERE = ("curriculum_learning", "progressive_layer_drop")
"""Features that change what is computed; their own packages hold them to a reference."""

MODES = {"bf16": 2e-2, "fp16": 2e-3, "torch_autocast": 2e-2}
"""Mode of reduced precision -> bound of a loss's relative difference: about two roundings."""


def registry() -> Registry:
    """Ranks of one sequence compute with other sequences here.

    To all but the model these are as good as parts of one.
    """
    return Registry.installed().with_plugins(SharedSequences)


def features() -> dict[str, Sequence[Any]]:
    """The values worth combining of every installed plugin, read from the plugins themselves."""
    registry = Registry.installed()
    found: dict[str, Sequence[Any]] = {"data_parallel.overlap": (True, False)}
    for name in registry.names("plugins"):
        entry = registry.find("plugins", name)
        assert entry is not None
        plugin: type[Plugin] = entry.load()
        values = plugin({path: model() for path, model in plugin.sections.items() if path == name})
        found.update(
            {
                path: options
                for path, options in values.feature_values().items()
                if not path.startswith(ELSEWHERE)
            }
        )
    return found


def config_of(row: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    }
    for path, value in row.items():
        section = config
        *parents, leaf = path.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    if config.get("fp16", {}).get("enabled"):
        config["fp16"]["loss_scale"] = 128.0
    if "zero_optimization" in config:  # a model so small would stay gathered as a whole
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def world_of(config: Mapping[str, Any]) -> int:
    """Two ranks, or two along ``tp`` and two along ``data`` where another feature shares data."""
    shares_data = config["sequence_parallel_size"] > 1 or config["moe"]["ep_size"] > 1
    return 4 if config["tensor_parallel"]["autotp_size"] > 1 and shares_data else 2


def parts_of(config: Mapping[str, Any]) -> int:
    """Ranks with data of their own; those of a tensor-parallel group have the same."""
    parts: int = world_of(config) // config["tensor_parallel"]["autotp_size"]
    return parts


def micro_batches(steps: int, accumulation: int, parts: int) -> list[list[list[torch.Tensor]]]:
    """Tokens by step, micro-batch and part of the data."""
    generator = torch.Generator().manual_seed(5)
    shape = (steps, accumulation, parts, MICRO_BATCH, 9)
    return [
        [list(micro) for micro in step] for step in torch.randint(64, shape, generator=generator)
    ]


def train(config: dict[str, Any]) -> list[float]:
    module = gpt_with_experts()
    engine, *_ = drivetrain.initialize(
        model=module, model_parameters=module.parameters(), config=config, registry=registry()
    )
    accumulation = engine.gradient_accumulation_steps()
    managed = config.get("managed_gradient_accumulation", True)
    losses = []
    own = engine.job.mesh.coordinate("data")
    for step in micro_batches(STEPS, accumulation, engine.job.mesh.size("data")):
        total = 0.0
        for micro in step:
            tokens = micro[own]
            loss = engine(tokens[:, :-1], tokens[:, 1:])
            if managed:
                engine.backward(loss)
                engine.step()
            else:
                engine.backward(loss / accumulation, scale_wrt_gas=False)
            total += loss.item() / accumulation
        if not managed:
            engine.step()
        losses.append(total)
    engine.destroy()
    return losses


def reference(config: dict[str, Any]) -> list[float]:
    """The same in one process with nothing but torch: masters in fp32, work in the mode's dtype."""
    accumulation = config.get("gradient_accumulation_steps", 1)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((low[m] for m in low if config.get(m, {}).get("enabled")), torch.float32)
    autocast = config.get("torch_autocast", {}).get("enabled", False)
    masters = gpt_with_experts()
    worker = copy.deepcopy(masters).to(dtype)
    optimizer = torch.optim.SGD(masters.parameters(), lr=0.1, momentum=0.9)
    parts = parts_of(config)
    shards = parts // config["sequence_parallel_size"]
    factor = shards if config["gradient_allreduce_op"] == "sum" else 1
    losses = []
    for step in micro_batches(STEPS, accumulation, parts):
        optimizer.zero_grad()
        total = 0.0
        for tokens in (tokens for micro in step for tokens in micro):
            worker.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = worker(tokens[:, :-1], tokens[:, 1:])
            (loss * 128.0).backward()
            total += loss.item() / (accumulation * parts)
            for master, work in zip(masters.parameters(), worker.parameters(), strict=True):
                assert work.grad is not None
                share = work.grad.float() / 128.0 / (accumulation * parts) * factor
                master.grad = share if master.grad is None else master.grad + share
        if config["gradient_clipping"]:
            nn.utils.clip_grad_norm_(masters.parameters(), config["gradient_clipping"])
        optimizer.step()
        worker.load_state_dict(masters.state_dict())
        losses.append(total)
    return losses


def beyond_pairs(values: Mapping[str, Sequence[Any]], count: int) -> list[dict[str, Any]]:
    """Rows drawn at random: faults that need three values or more, for which pairs are too few."""
    draw = random.Random(count).choice
    return [{name: draw(values[name]) for name in sorted(values)} for _ in range(count)]


ROWS = list(all_pairs(features()))
MORE_ROWS = [pytest.param(row, marks=pytest.mark.long) for row in beyond_pairs(features(), 60)]


def label(row: dict[str, Any]) -> str:
    return ",".join(f"{path}={value}" for path, value in row.items() if value not in (False, None))


def test_the_rows_contain_every_pair_of_values() -> None:
    values = features()
    for a, b in combinations(sorted(values), 2):
        for x, y in product(values[a], values[b]):
            assert any(row[a] == x and row[b] == y for row in ROWS), (a, x, b, y)


@pytest.mark.parametrize("row", [*ROWS, *MORE_ROWS], ids=label)
def test_a_combination_trains_to_the_reference_or_is_refused_by_name(row: dict[str, Any]) -> None:
    config = config_of(row)
    world = world_of(config)
    active = [mode for mode in MODES if config.get(mode, {}).get("enabled")]
    clash = len(active) > 1 or (
        config["prescale_gradients"] and config["gradient_predivide_factor"] != 1.0
    )
    if clash:
        with pytest.raises(ConfigError) as caught:
            Plan.build(config, world_size=world, registry=registry())
        named = active if len(active) > 1 else ["gradient_predivide_factor"]
        assert any(name in str(caught.value) for name in named)
        # What is left after the refused part has been taken out must train.
        for mode in active[1:]:
            config[mode]["enabled"] = False
        config["prescale_gradients"] = False
    bound = max((MODES[mode] for mode in active[:1]), default=2e-6)
    losses = [
        sum(ranks) / world for ranks in zip(*run_distributed(train, world, config), strict=True)
    ]
    assert losses == pytest.approx(reference(config), rel=bound)
