"""Scripts catch errors by the classes that DeepSpeed raises."""

from __future__ import annotations

import pickle
import sys
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed._parts.errors import AsDeepSpeed, of_deepspeed
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedFP16Config
from deepspeed.runtime.zero import offload_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from drivetrain.errors import CheckpointError, ConfigError, TrainingError
from drivetrain.testing import run_distributed

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "Adam"},
    "checkpoint": {"tag_validation": "FAIL"},
}


def engine_of(**config):
    return deepspeed.initialize(model=torch.nn.Linear(2, 2), config=CONFIG | config)[0]


@pytest.mark.parametrize("kind", [AssertionError, ValueError, ConfigError])
def test_a_wrong_config_is_caught_by_every_class_that_says_so(kind):
    with pytest.raises(kind, match=r"model must be a torch\.nn\.Module"):
        deepspeed.initialize(model=None, config=CONFIG)
    with pytest.raises(kind, match="gradient_allreduce_op"):
        DeepSpeedConfig(CONFIG | {"gradient_allreduce_op": "max"})
    with pytest.raises(deepspeed.DeepSpeedConfigError, match="tag_validation"):
        engine_of(checkpoint={"tag_validation": "foo"})


def test_ranks_that_nobody_is_to_connect_are_an_error(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(AssertionError, match="nothing has connected the 2 ranks"):
        deepspeed.initialize(model=torch.nn.Linear(2, 2), config=CONFIG, dist_init_required=False)


def test_wrong_calls_of_an_engine_are_assertions_too(tmp_path):
    engine = engine_of()
    with engine.no_sync():
        with pytest.raises(AssertionError, match="cannot be nested"), engine.no_sync():
            pass
        with pytest.raises(AssertionError, match="inside no_sync"):
            engine.step()
    for nothing in (None, ""):
        with pytest.raises(ValueError, match="save_dir is"):
            engine.save_checkpoint(nothing)
    engine.destroy()


def different_tags(folder):
    engine = engine_of()
    rank = engine.global_rank
    with pytest.raises(AssertionError, match="tag") as caught:
        engine.save_checkpoint(folder, tag=f"of-{rank}")
    engine.destroy()
    return isinstance(caught.value, CheckpointError)


def test_tags_that_differ_are_an_assertion_on_every_rank(tmp_path):
    assert run_distributed(different_tags, 2, str(tmp_path)) == [True, True]


def test_names_of_other_packages_raise_as_deepspeeds_do():
    net = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no module of class"):
        deepspeed.utils.set_z3_leaf_modules(net, [torch.nn.Conv2d])
    with pytest.raises(RuntimeError, match="in_splits is 3"):
        deepspeed.zero.TiledLinear(2, 2, in_splits=3)
    tiled = deepspeed.zero.TiledLinear(5, 4, in_splits=2, init_linear=torch.nn.Linear(5, 4))
    assert (tiled.in_parts, tiled.out_parts) == ([0, 3, 5], [0, 4])
    assert type(pickle.loads(pickle.dumps(tiled))) is deepspeed.runtime.zero.tiling.TiledLinear
    with pytest.raises(ValueError, match="names core 2 twice"):
        deepspeed.utils.numa.parse_range_list("0-3,2")


def test_errors_stay_what_they_are_and_travel_between_processes():
    error = of_deepspeed(ConfigError(["one: wrong", "two: wrong"]))
    again = pickle.loads(pickle.dumps(error))
    for found in (error, again):
        assert isinstance(found, ConfigError)
        assert isinstance(found, AssertionError)
        assert found.problems == ["one: wrong", "two: wrong"]
        assert str(found) == "one: wrong\ntwo: wrong"
    assert of_deepspeed(again) is again
    with pytest.raises(TrainingError) as caught, AsDeepSpeed():
        raise TrainingError("wrong") from KeyError("why")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("scale", [-1, float("inf"), float("nan"), True, []])
def test_a_section_of_wrong_values_is_an_error_of_pydantic(scale):
    with pytest.raises(ValidationError):
        DeepSpeedFP16Config(loss_scale=scale)


def test_sections_of_zero_are_objects_as_deepspeed_has_them():
    plain = DeepSpeedZeroConfig(stage=2)
    assert (plain.offload_param, plain.offload_optimizer, plain.overlap_comm) == (None, None, False)
    assert DeepSpeedZeroConfig(stage=3).overlap_comm
    old = DeepSpeedZeroConfig(cpu_offload=True, cpu_offload_param=True)
    assert isinstance(old.offload_param, offload_config.DeepSpeedZeroOffloadParamConfig)
    assert old.offload_optimizer.device == "cpu"
    assert not old.offload_optimizer.pipeline
    other = offload_config.DeepSpeedZeroOffloadOptimizerConfig(pipeline_write=True)
    assert other.pipeline
    leaves = DeepSpeedZeroConfig(leaf_module={"classes": "a.B", "names": ["c"]}).leaf_module
    assert (leaves.classes, leaves.names, leaves.name_suffixes) == (["a.B"], ["c"], [])


def test_a_config_may_be_hjson_where_its_reader_is_installed(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_text("{\n  train_micro_batch_size_per_gpu: 3\n}\n")
    with pytest.raises(ConfigError, match=r"config\.json"):
        DeepSpeedConfig(str(file))

    class HjsonDecodeError(ValueError):
        pass

    def loads(text, object_pairs_hook):
        name, _, value = text.strip("{} \n").partition(":")
        return object_pairs_hook([(name, int(value))])

    reader = SimpleNamespace(loads=loads, HjsonDecodeError=HjsonDecodeError)
    monkeypatch.setitem(sys.modules, "hjson", reader)
    assert DeepSpeedConfig(str(file)).train_micro_batch_size_per_gpu == 3


def test_operations_are_named_in_any_case():
    assert DeepSpeedConfig(CONFIG | {"gradient_allreduce_op": "SUM"}).gradient_allreduce_op == "sum"


def test_on_one_rank_scripts_ask_for_parameters_of_zero_init_as_on_many():
    config = {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        net = torch.nn.Linear(3, 2)
    status = deepspeed.zero.ZeroParamStatus
    assert net.weight.ds_status == status.NOT_AVAILABLE
    with deepspeed.zero.GatheredParameters([net.weight]):
        with deepspeed.zero.GatheredParameters(net.weight):
            assert net.weight.ds_status == status.AVAILABLE
        assert net.weight.ds_status == status.AVAILABLE
        assert net.bias.ds_status == status.NOT_AVAILABLE
    assert net.weight.ds_status == status.NOT_AVAILABLE
    assert torch.equal(net.weight.ds_tensor, net.weight.detach().flatten())
    assert not net.weight.ds_persist
    assert net.weight.ds_id != net.bias.ds_id
    assert (net.weight.ds_numel, tuple(net.weight.ds_shape)) == (6, (2, 3))
    assert not hasattr(torch.nn.Linear(3, 2).weight, "ds_id")
