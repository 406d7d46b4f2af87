"""One hash of weights and states on 1, 2, 3 and 4 ranks, whatever else the config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exact_training import MICRO_BATCH, Model, data, trained

from drivetrain.testing import run_distributed

CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {
        "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
        "gradient_clipping": None,
    },
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
    "small buckets": {"data_parallel": {"bucket_bytes": 256, "first_bucket_bytes": 64}},
}


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_ends_with_the_same_bits(case: str) -> None:
    worlds = (1, 2, 3, 4) if case == "adamw" else (1, 3)
    found = {world: run_distributed(trained, world, CASES[case])[0][0] for world in worlds}
    assert len(set(found.values())) == 1, found


def test_without_the_section_bits_depend_on_the_number_of_ranks() -> None:
    keys = {"exact": None}
    found = {run_distributed(trained, world, keys)[0][0] for world in (1, 3)}
    assert len(found) == 2


def test_a_run_that_is_resumed_on_other_ranks_has_the_bits_of_the_unbroken_one(
    tmp_path: Path,
) -> None:
    unbroken = run_distributed(trained, 2, {}, 6)[0][0]
    run_distributed(trained, 4, {}, 3, 0.2, None, str(tmp_path))
    resumed = run_distributed(trained, 3, {}, 6, 0.2, str(tmp_path))[0][0]
    assert resumed == unbroken


def test_the_training_is_that_of_plain_torch() -> None:
    """Rounded to a unit that is 2**-43 of the norm; nothing else is changed."""
    steps, lr = 4, 0.02
    keys = {
        "optimizer": {"type": "SGD", "params": {"lr": lr}},
        "gradient_clipping": None,
        "seed": 5,
    }
    _, weights = run_distributed(trained, 2, keys, steps, 0.0)[0]
    torch.manual_seed(3)
    model = Model(0.0)
    model.double()
    for batch in order(keys["seed"], steps):
        losses = [model(*micro_batch) for micro_batch in batch]
        model.zero_grad()
        (sum(losses) / len(losses)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= lr * parameter.grad
    for found, expected in zip(weights, model.state_dict().values(), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6)


def order(seed: int, steps: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Micro-batches of each step, as one process is dealt them."""
    from exact_training import GLOBAL_BATCH

    from drivetrain.contracts import LoaderRequest
    from drivetrain.engine.loader import DataLoader, RepeatingLoader

    loader = iter(RepeatingLoader(DataLoader(LoaderRequest(data(), MICRO_BATCH, seed=seed))))
    return [[next(loader) for _ in range(GLOBAL_BATCH // MICRO_BATCH)] for _ in range(steps)]
