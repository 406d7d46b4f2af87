"""Recomputed blocks whose parameters are gathered, with activations that are away or in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from several_axes import data
from several_axes import make as make_tensor_parallel
from torch import nn

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed
from drivetrain.testing.models import TinyGPT

STEPS = 3
ALL = {"recompute": "all"}
SECTIONS: list[dict[str, Any]] = [
    ALL,
    {"recompute": 2},
    {"recompute": "as_needed", "memory_limit": 60_000},
]


def model(adapted: bool) -> nn.Module:
    torch.manual_seed(0)
    found = TinyGPT(layers=3, width=16, dropout=0.2, tied=True)
    if adapted:  # nothing that enters the first block has a gradient
        found.requires_grad_(False)
        for block in found.blocks:
            block.up.requires_grad_(True)
    return found


def curve(stage: int, adapted: bool, section: dict[str, Any] | None, backwards: int) -> list[Any]:
    engine, *_ = drivetrain.initialize(
        model=model(adapted),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            **({} if section is None else {"activation_checkpointing": section}),
        },
    )
    found: list[Any] = []
    for step in range(2 * STEPS):
        generator = torch.Generator().manual_seed(100 * step + Ranks.current().rank)
        tokens = torch.randint(64, (2, 9), generator=generator)
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        for left in reversed(range(backwards)):
            engine.backward(loss, retain_graph=left > 0)
        engine.step()
        found.append(loss.item())
    found += [value.tolist() for value in engine.module_state_dict().values()]
    engine.job.close()
    return found


def curves(adapted: bool, backwards: int) -> list[list[Any]]:
    return [
        curve(stage, adapted, section, backwards)
        for stage, section in [
            (3, None),
            *((3, section) for section in SECTIONS),
            (2, None),
            (2, ALL),
        ]
    ]


@pytest.mark.parametrize("adapted", [False, True], ids=["trained", "adapted"])
def test_recomputed_blocks_of_gathered_parameters_train_bitwise_alike(adapted: bool) -> None:
    for third, *recomputed, second, again in run_distributed(curves, 2, adapted, 1, timeout=100):
        assert again == second
        for found in recomputed:
            assert found == third


def test_several_backwards_recompute_each_time() -> None:
    for third, *recomputed, second, again in run_distributed(curves, 2, False, 2, timeout=100):
        assert again == second
        for found in recomputed:
            assert found == third


def tensor_parallel(stage: int, section: dict[str, Any] | None) -> list[Any]:
    changes = {} if section is None else {"activation_checkpointing": section}
    engine = make_tensor_parallel(stage, 2, **changes)
    found: list[Any] = []
    for step in range(STEPS):
        loss = engine(*data(step, engine.job.mesh.coordinate("dp")))
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    engine.job.close()
    return found


def several_axes() -> list[list[Any]]:
    parts = {"recompute": "all", "partition_activations": True}
    measured = {**parts, "recompute": "as_needed", "memory_limit": 400}
    return [tensor_parallel(3, section) for section in (None, parts, measured)]


def test_parts_of_inputs_and_of_parameters_are_gathered_over_their_own_axes() -> None:
    for plain, *partitioned in run_distributed(several_axes, 4, timeout=100):
        for found in partitioned:
            assert found == plain


def test_two_that_move_inputs_are_refused_and_recomputation_beside_offload_is_not() -> None:
    config = {"train_batch_size": 1, "activation_offload": {"enabled": True}}
    Plan.build({**config, "activation_checkpointing": ALL}, world_size=1)
    for key in ("cpu_checkpointing", "partition_activations"):
        with pytest.raises(ConfigError, match=f"activation_checkpointing.{key}") as caught:
            Plan.build({**config, "activation_checkpointing": {key: True}}, world_size=1)
        assert "both decide where the inputs of recomputed blocks wait" in str(caught.value)
