"""Experts that are shared out at stage 3 are written to one file, also where they come first."""

from __future__ import annotations

from pathlib import Path

import torch
from drivetrain_moe import MoE
from drivetrain_zero import save_16bit_model
from safetensors.torch import load_file
from torch import nn

import drivetrain
from drivetrain.testing import run_distributed

WIDTH = 6


class Block(nn.Module):
    """Has its experts before anything that ranks have in common, or behind it."""

    def __init__(self, *, experts_first: bool) -> None:
        super().__init__()
        expert = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        self.moe = MoE(WIDTH, expert, 4, ep_size=2, k=1, drop_tokens=False)
        if experts_first:
            self.moe.gate = self.moe._modules.pop("gate")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.moe(x)[0]
        return x + output


def build(*, experts_first: bool, frozen: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(experts_first=experts_first) for _ in range(2)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or "experts" in name)
    return model


CASES = {"experts first": (True, False), "others frozen": (False, True)}


def export(folder: str) -> None:
    for name, (experts_first, frozen) in CASES.items():
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "cpu": {"shared_memory": False},  # with it ranks of one host read each by itself
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        }
        model = build(experts_first=experts_first, frozen=frozen)
        engine = drivetrain.initialize(model=model, config=config)[0]
        save_16bit_model(engine, folder, f"{name}.safetensors", exclude_frozen_parameters=frozen)
        engine.destroy()


def test_ranks_gather_a_unit_together_where_the_first_entry_is_an_expert(tmp_path: Path) -> None:
    run_distributed(export, 2, str(tmp_path), timeout=120)
    for name, (experts_first, frozen) in CASES.items():
        model = build(experts_first=experts_first, frozen=frozen)
        found = load_file(tmp_path / f"{name}.safetensors")
        expected = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        assert found.keys() >= expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value)


def of_one_rank() -> str:
    model = build(experts_first=False, frozen=False)
    own = [p for n, p in model.named_parameters() if n.startswith("0.moe.experts.0.")]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    try:
        drivetrain.initialize(model=model, model_parameters=own, config=config)
    except drivetrain.errors.ConfigError as error:
        return str(error)
    return "no error"


def test_every_rank_says_that_one_has_no_parameter_of_the_optimizer() -> None:
    first, second = run_distributed(of_one_rank, 2, timeout=120)
    assert first == second
    assert first.startswith("rank 1: no parameter of the optimizer is trainable")
    assert "other ranks keep all of them" in first
