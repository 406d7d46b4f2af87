"""Methods after training on what each stage of ZeRO has trained, in each precision."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import all_pairs

import drivetrain
from drivetrain.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "compression" / "tests"))

from drivetrain_compression import compress_module
from tiny_models import llama, rows

RANKS = 2
RECIPES: dict[str, list[dict[str, Any]]] = {
    "round": [{"round": {"bits": 8, "activations": "int8"}}],
    "clipped": [{"round": {"group": 16, "clip": True}}],
    "float": [{"round": {"format": "e2m1", "group": 16, "low_rank": 2}}],
    "hqq": [{"hqq": {"group": 16, "symmetric": False}}],
    "gptq": [{"gptq": {"group": 16, "sweeps": 1}}],
    "awq": [{"awq": {"group": 16}}, {"gptq": {"group": 16}}],
    "smoothquant": [{"smoothquant": {}}, {"gptq": {"bits": 8, "activations": "int8"}}],
    "zeroquant": [{"zeroquant": {"group": 16, "steps": 2}}],
    "rotate": [{"rotate": {}}, {"round": {"group": 16}}],
    "sparsegpt": [{"sparsegpt": {"pattern": "2:4"}}, {"round": {"group": 16}}],
    "wanda": [{"wanda": {"pattern": "0.5"}}],
}
PRECISIONS = ("fp32", "bf16", "fp16")
CASES = list(all_pairs({"recipe": [*RECIPES], "stage": [0, 1, 2, 3], "precision": PRECISIONS}))
FEW = [{"recipe": "smoothquant", "stage": 3, "precision": "bf16"},
       {"recipe": "gptq", "stage": 2, "precision": "fp16"}]  # fmt: skip


def trained(stage: int, precision: str) -> Any:
    """What one step leaves, whole on this rank."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    engine = drivetrain.initialize(model=llama(), config=config)[0]
    ids = rows(2 * RANKS)[engine.job.rank]
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    with drivetrain.whole(engine.module):
        module = copy.deepcopy(engine.module)
    engine.destroy()
    return module


def compressed(cases: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Weights before and after, for each case."""
    found = []
    for case in cases:
        module = trained(case["stage"], case["precision"])
        before = {name: value.clone() for name, value in module.state_dict().items()}
        compress_module(module, {"modifiers": RECIPES[case["recipe"]]}, rows())
        found.append((before, dict(module.state_dict())))
    return found


def check(cases: list[dict[str, Any]]) -> None:
    by_rank = run_distributed(compressed, RANKS, cases)
    for number, case in enumerate(cases):
        ranks = [found[number] for found in by_rank]
        before, after = ranks[0]
        plain = llama()
        assert any(not torch.equal(before[n].float(), v) for n, v in plain.state_dict().items())
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        plain = plain.to(dtype[case["precision"]])
        plain.load_state_dict(before)
        compress_module(plain, {"modifiers": RECIPES[case["recipe"]]}, rows())
        wanted = plain.state_dict()
        assert wanted.keys() == after.keys(), case
        for name, value in wanted.items():
            assert value.dtype == after[name].dtype, (case, name)
            assert torch.equal(value, after[name]), (case, name)
            assert torch.equal(value, ranks[1][1][name]), (case, name)


def test_a_module_made_whole_is_compressed_like_one_that_was_never_in_shards() -> None:
    check(FEW)


@pytest.mark.long
def test_so_it_is_for_every_pair_of_method_stage_and_precision() -> None:
    assert len({(c["recipe"], c["stage"]) for c in CASES}) == len(RECIPES) * 4
    check(CASES)
