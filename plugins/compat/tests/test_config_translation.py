"""A config as DeepSpeed reads it, translated."""

from __future__ import annotations

import copy
from collections import Counter

import deepspeed
import pytest
import torch
from deepspeed._config.keys import DEFAULTS, paths
from deepspeed._config.status import key_status
from deepspeed._config.translate import WITHOUT_EFFECT, translate
from deepspeed._config.view import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan

PRUNES_ALL = {
    "compression_training": {
        "sparse_pruning": {
            "shared_parameters": {
                "enabled": True,
                "method": "snip_momentum",
                "schedule_offset": 1,
                "schedule_offset_end": 3,
                "dense_ratio": 0.4,
                "block_pattern": "4x1",
            },
            "different_groups": {},
        }
    }
}
"""This method needs no groups: without any it prunes the whole model."""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"steps_per_print": float("inf")}, {"steps_per_print": 0}),
        ({"zero_optimization": True}, {"zero_optimization": {"stage": 1}}),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        ),
        (
            {"zero_optimization": {"stage": 3, "cpu_offload_params": True, "cpu_offload": False}},
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "cpu_offload": True,
                    "offload_optimizer": {"device": "nvme", "nvme_path": "/x"},
                }
            },
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "nvme", "nvme_path": "/x"},
                }
            },
        ),
        (
            {"gradient_clipping": None, "zero_optimization": {"offload_param": None, "stage": 3}},
            {"zero_optimization": {"stage": 3}},
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"fused": None}}},
            {"optimizer": {"type": "AdamW", "params": {"fused": None}}},
        ),
        (
            {"zero_allow_untested_optimizer": 1, "fp16": {"enabled": 0, "hysteresis": 1}},
            {"zero_allow_untested_optimizer": True, "fp16": {"enabled": False, "hysteresis": 1}},
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "5e8"}, "gradient_clipping": "1"},
            {"zero_optimization": {"reduce_bucket_size": 5e8}, "gradient_clipping": "1"},
        ),
        (
            {"fp16": {"enabled": True, "loss_scale": "128", "loss_scale_window": 0}},
            {"fp16": {"enabled": True, "loss_scale": 128}},
        ),
        ({"fp16": {"min_loss_scale": -1}}, {"fp16": {}}),
        (
            {"fp16": {"enabled": True, "min_loss_scale": -1}},
            {"fp16": {"enabled": True, "min_loss_scale": -1}},
        ),
        ({"wandb": {"project": "x"}}, {"wandb": {"project": "x", "enabled": False}}),
        ({"wandb": {"enabled": True}}, {"wandb": {"enabled": True}}),
        ({"comms_logger": {"verbose": True}}, {"comms_logger": {"verbose": True}}),
        ({"tensor_parallel": {"autotp_size": 1}}, {}),
        ({"tensor_parallel": {"autotp_size": 2}}, {"tensor_parallel": {"autotp_size": 2}}),
        ({"seq_parallel_communication_data_type": "fp32"}, {}),
        (
            {"activation_checkpointing": {"partition_activations": True, "other": 1}},
            {"activation_checkpointing": {"partition_activations": True}},
        ),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            {"activation_checkpointing": {"cpu_checkpointing": True}},
        ),
        ({"mine": 1, "seed": 3}, {"seed": 3}),
        (
            {"plugins": {}, "bfloat16": {"enabled": True}},
            {"plugins": {}, "bfloat16": {"enabled": True}},
        ),
        ({"checkpoint": {"async_io": True, "keep_last": 2}}, {"checkpoint": {"keep_last": 2}}),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cubic"}}},
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "log"}}},
        ),
        (
            {"eigenvalue": {"enabled": True, "model_name": "bert-large"}, "seed": 3},
            {"seed": 3},
        ),
        (
            {
                "compression_training": {
                    "weight_quantization": {
                        "shared_parameters": {"enabled": True},
                        "different_groups": {},
                    }
                }
            },
            {"compression_training": {}},
        ),
        (PRUNES_ALL, PRUNES_ALL),
        (
            {"scheduler": {"type": "OfMine", "params": {"warmup_type": "cosine"}}},
            {"scheduler": {"type": "OfMine", "params": {"warmup_type": "cosine"}}},
        ),
    ],
)
def test_what_a_config_becomes(given, expected):
    before = copy.deepcopy(given)
    assert translate(given).config == expected
    assert given == before


@pytest.mark.parametrize("path", WITHOUT_EFFECT)
def test_a_key_without_effect_is_accepted_with_one_line(path):
    given = section = {"train_batch_size": 1}
    *above, key = path.split(".")
    for name in above:
        section = section.setdefault(name, {})
    section[key] = True
    done = translate(given)
    assert done.notes == [f"{path}: no effect, {WITHOUT_EFFECT[path]}"]
    Plan.build(done.config, world_size=1)


def test_a_key_that_deepspeed_never_looks_at_is_named_with_a_guess():
    done = translate({"gradient_cliping": 1.0, "optimizer": {"type": "SGD", "parms": {}}})
    assert [line.split(", so")[0] for line in done.ignored] == [
        "gradient_cliping: DeepSpeed has no such key and never looks at it",
        "optimizer.parms: DeepSpeed has no such key and never looks at it",
    ]
    assert "did you mean 'gradient_clipping'?" in done.ignored[0]
    assert "did you mean 'params'?" in done.ignored[1]
    offloaded = {"stage": 2, "offload_param": {"device": "cpu"}}
    done = translate({"zero_optimization": offloaded})
    assert done.config == {"zero_optimization": {"stage": 2}}
    assert "DeepSpeed looks at it at stage 3 alone" in done.ignored[0]
    assert translate({"zero_optimization": {**offloaded, "stage": 3}}).ignored == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"zero_optimization": {"stage": 1, "stge": 1}}, "zero_optimization.stge: unknown key"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine: served by drivetrain-hybrid-engine"),
        ({"amp": {"enabled": True}}, "amp: apex is not supported"),
    ],
)
def test_what_deepspeed_refuses_or_a_package_serves_is_left_to_core(given, words):
    with pytest.raises(ConfigError) as caught:
        Plan.build(translate({"train_batch_size": 1, **given}).config, world_size=1)
    assert words in str(caught.value)


def test_all_defaults_at_once_train_as_if_nothing_was_given():
    """What frameworks write out when they fill in a whole config, but for absent packages."""
    given = copy.deepcopy(dict(DEFAULTS)) | {"train_batch_size": 4}
    for name in ("optimizer", "scheduler", "pipeline", "sparse_attention", "datastates_ckpt"):
        del given[name]
    zero = given["zero_optimization"]
    for name in ("zenflow", "zeropp_loco_param"):
        del zero[name]
    for name in [name for name in zero if f"stage3_{name}" in zero]:
        del zero[name]  # the other name of the same key
    plan = Plan.build(translate(given).config, world_size=1)
    plain = Plan.build({"train_batch_size": 4}, world_size=1)
    ours = plan.features()
    assert {k: ours[k] for k in plain.features()} == plain.features()


def with_default(path, default):
    """A config that gives one key the value that DeepSpeed takes by default."""
    config = section = {"train_batch_size": 1}
    *above, key = path.split(".")
    for name in above:
        section = section.setdefault(name, {})
    section[key] = 1 if path == "train_batch_size" else default
    for name, kind in (("optimizer", "SGD"), ("scheduler", "WarmupLR")):
        if name in config:
            config[name] = {"type": kind} | {k: v for k, v in config[name].items() if v is not None}
    if "zenflow" in config.get("zero_optimization", {}):
        config["zero_optimization"] |= {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    return config


def test_what_the_guide_says_of_a_key_is_true():
    told = Counter()
    for path, default in paths():
        status, text = key_status(path)
        told[status] += 1
        done = translate(with_default(path, default))
        problem = ""
        try:
            Plan.build(done.config, world_size=1)
        except ConfigError as error:
            problem = str(error)
        if problem:
            words = text.split("`")[1] if status == "needs" else path.split(".")[0]
            assert status in ("needs", "refused"), path
            assert words in problem, path
            continue
        assert done.ignored == [] or status == "without effect", path
        if status == "needs":  # by default these are off
            given = done.config.get(path.split(".")[0], {})
            assert not isinstance(given, dict) or not given.get("enabled"), path
    assert told["works"] > 100


def test_paths_are_those_of_values():
    listed = dict(paths())
    assert listed["zero_optimization.offload_param.device"] == "none"
    assert "zero_optimization" not in listed
    assert "optimizer.params" in listed


def test_a_model_is_constructed_in_shards_by_a_config_that_only_deepspeed_reads(tmp_path):
    given = {
        "train_batch_size": "auto",
        "steps_per_print": float("inf"),
        "typo": 1,
        "zero_optimization": {"stage": 3, "offload_param": None},
    }
    (tmp_path / "config.json").write_text('{"mine": 1, "zero_optimization": {"stage": 3}}')
    module = torch.nn.Linear(2, 2)
    for arguments in (
        {"config_dict_or_path": given},
        {"config": str(tmp_path / "config.json")},
        {"module": module, "config_dict_or_path": given, "dtype": torch.float32},
    ):
        with deepspeed.zero.Init(**arguments):
            assert torch.nn.Linear(2, 2).weight.dtype == torch.float32
    with deepspeed.zero.Init(None, None, True, None, False, given, enabled=False):
        torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"zero_optimization\.stge: unknown key"):
        deepspeed.zero.Init(config={"zero_optimization": {"stage": 3, "stge": 1}})


def test_the_object_of_a_config_has_its_values(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = DeepSpeedConfig(
        {
            "train_batch_size": 16,
            "gradient_accumulation_steps": 2,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        }
    )
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (16, 4)
    assert config.gradient_accumulation_steps == 2
    assert config.zero_enabled
    assert config.zero_config.stage == config.zero_optimization_stage == 2
    assert config.bfloat16_enabled
    assert not config.fp16_enabled
    assert config.optimizer_params == {"lr": 0.1}
    assert config.gradient_clipping == 1.0
    assert config.world_size == 2
    with pytest.raises(AttributeError, match=r"no attribute 'nothing' here; engine\.config is it"):
        config.nothing  # noqa: B018


def test_sizes_of_batches_may_be_set_and_completed_again(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = DeepSpeedConfig({"train_batch_size": 16})
    config.train_batch_size = None
    config.train_micro_batch_size_per_gpu = 3
    config.gradient_accumulation_steps = 5
    config._configure_train_batch_size()
    assert config.train_batch_size == 3 * 5 * 2
    config.train_batch_size = 31
    with pytest.raises(AssertionError, match="31 != 3"):
        config._configure_train_batch_size()
    for wrong in (0, -16, "32"):
        config.train_batch_size = wrong
        with pytest.raises(AssertionError, match=f"from 1 on, not {wrong!r}"):
            config._configure_train_batch_size()


def test_keys_without_effect_are_shown_as_they_were_given():
    assert DeepSpeedZeroConfig(cpu_offload_param=True).offload_param.device == "cpu"
    assert DeepSpeedZeroConfig(stage=2, grad_hooks=False).grad_hooks is False
    assert DeepSpeedZeroConfig(stage=2).grad_hooks is True
    assert (
        DeepSpeedFP16Config(enabled=True, loss_scale=8, loss_scale_window=-1).loss_scale_window
        == -1
    )
