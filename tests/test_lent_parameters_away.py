"""An engine reads what another one keeps in host memory or in files between its uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.testing import run_distributed


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))  # on all ranks


def read_beside_training(place: dict[str, Any]) -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_param": place}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": zero,
    }
    module, plain = network(), network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    owner, *_ = drivetrain.initialize(model=module, config=config)
    reader, *_ = drivetrain.initialize(model=module, config={"train_micro_batch_size_per_gpu": 4})
    for step in range(3):
        owner.backward(owner(batch(step)).square().mean())
        owner.step()
        plain(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(reader(batch(9)), plain(batch(9)))
    with drivetrain.whole(reader.module):
        for found, expected in zip(module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found, expected)
    whole, saved = dict(plain.named_parameters()), reader.states.fragments()
    assert saved
    for fragment in saved:
        for box in fragment.boxes:
            found = box.of_storage(fragment.read())
            torch.testing.assert_close(found, box.of(whole[fragment.name].detach()))
    for engine in (reader, owner):
        engine.destroy()
        engine.job.close()


@pytest.mark.parametrize("device", ["cpu", "nvme"])
@pytest.mark.parametrize("world", [1, 2])
def test_an_engine_reads_what_another_keeps_away(device: str, world: int, tmp_path: Path) -> None:
    place = {"device": device, **({"nvme_path": str(tmp_path)} if device == "nvme" else {})}
    run_distributed(read_beside_training, world, place)
