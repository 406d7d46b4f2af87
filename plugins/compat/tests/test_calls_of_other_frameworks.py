"""The calls that frameworks make which are not installed with the tests, one after another.

Read from MMEngine 0.10 (``_strategy/deepspeed.py``), Determined (``pytorch/deepspeed``) and
Composer 0.16, the last one with DeepSpeed.
"""

from __future__ import annotations

import json

import deepspeed
import pytest
import torch
from packaging.version import Version
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def as_mmengine_does(folder, stage):
    """Its strategy: an optimizer of its own, checkpoints under names without a pointer."""
    deepspeed.init_distributed(dist_backend="gloo")
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10000000000000,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    model = net()
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config
    )
    assert next(engine.parameters()).dtype == torch.float32
    losses = [update(engine) for _ in range(2)]
    kept = {"meta": {"seed": 1}, "optim_wrapper": {"base_param_settings": {"lr": 0.1}}}
    engine.save_checkpoint(
        folder, tag="epoch_1", client_state=kept, save_latest=False, exclude_frozen_parameters=None
    )
    losses += [update(engine)]
    _, found = engine.load_checkpoint(
        folder, tag="epoch_1", load_optimizer_states=True, load_module_strict=True
    )
    assert found["meta"]["seed"] == 1
    assert found.pop("optim_wrapper") == kept["optim_wrapper"]
    losses += [update(engine)]
    whole = (
        engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=None)
        if engine.zero_optimization_partition_weights()
        else engine.module_state_dict(exclude_frozen_parameters=None)
    )
    assert (len(optimizer.param_groups), engine.zero_gather_16bit_weights_on_model_save()) == (
        1,
        False,
    )
    engine.destroy()
    return losses, whole is not None and whole["0.weight"].shape == (8, 4)


def update(engine):
    loss = engine(torch.ones(2, 4)).square().mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


@pytest.mark.parametrize("stage", [2, 3])
def test_mmengine(stage, tmp_path):
    (losses, whole), _ = run_distributed(as_mmengine_does, 2, str(tmp_path), stage)
    assert losses[0] > losses[1] > losses[2]
    assert losses[3] == losses[2]  # trained again from the checkpoint
    assert whole


def test_mmengine_registers_optimizers_by_their_classes():
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.runtime.fp16.onebit import OnebitAdam, OnebitLamb, ZeroOneAdam

    known = (DeepSpeedCPUAdam, FusedAdam, FusedLamb, OnebitAdam, OnebitLamb, ZeroOneAdam)
    assert all(issubclass(kind, torch.optim.Optimizer) for kind in known)
    assert Version(deepspeed.__version__) >= Version("0.13.2")
    for kind in (OnebitLamb, ZeroOneAdam):
        assert kind(net().parameters(), lr=0.1).params["lr"] == 0.1
        with pytest.raises(ConfigError, match=f"{kind.__name__} has no amsgrad"):
            kind(net().parameters(), amsgrad=True)


def test_determined_reads_configs(tmp_path):
    from deepspeed.runtime import config_utils

    hook = config_utils.dict_raise_error_on_duplicate_keys
    assert json.loads('{"a": {"b": 1}}', object_pairs_hook=hook) == {"a": {"b": 1}}
    with pytest.raises(ValueError, match="the key 'b' is in the config twice"):
        json.loads('{"a": {"b": 1, "b": 2}}', object_pairs_hook=hook)


def as_determined_and_composer_do():
    """They make engines of all arguments by name, and know them by their class."""
    model = net()
    engine, optimizer, loader, schedule = deepspeed.initialize(
        config={"train_batch_size": 4, "gradient_accumulation_steps": 1,
                "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True},
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )  # fmt: skip
    engine = engine.to(engine.device)
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    assert (loader, schedule) == (None, None)
    sizes = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    assert engine.module is model
    assert engine.is_gradient_accumulation_boundary()
    engine.train()
    losses = [update(engine), update(engine)]
    assert optimizer.param_groups[0]["lr"] == 0.1
    engine.eval()
    engine.destroy()
    return sizes, losses


def test_determined_and_composer():
    for sizes, losses in run_distributed(as_determined_and_composer_do, 2):
        assert sizes == (2, 1)
        assert losses[1] < losses[0]
