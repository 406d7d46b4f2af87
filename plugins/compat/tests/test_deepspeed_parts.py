"""Small modules: communication, groups, accelerator, recomputation, kernels, helpers."""

from __future__ import annotations

import logging
import os
from unittest.mock import patch

import deepspeed
import pytest
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.runtime.utils import (
    PartitionedTensor,
    ensure_directory_exists,
    move_to_device,
    see_memory_usage,
)
from deepspeed.utils import groups, log_dist, log_dist_once, logger, required_torch_version
from deepspeed.utils.logging import set_log_level_from_string

from drivetrain.errors import ConfigError, PluginError
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed
from drivetrain.testing.parts import SharedSequences


def on_two_ranks():
    comm.init_distributed(verbose=False)
    rank = comm.get_rank()
    before = groups.get_data_parallel_world_size(), groups.get_sequence_parallel_world_size()
    alone = torch.tensor([rank + 1.0])
    comm.all_reduce(alone, group=groups.get_tensor_model_parallel_group())
    several = [torch.tensor([rank + 1.0]), torch.tensor([10.0 * rank])]
    comm.all_reduce_coalesced(several)
    gathered = [torch.empty(2), torch.empty(4)]
    comm.all_gather_coalesced(gathered, [torch.tensor([rank * 1.0]), torch.full((2,), rank + 5.0)])
    part = torch.empty(1)
    comm.reduce_scatter_fn(part, torch.tensor([1.0, 2.0]))
    module = torch.nn.Linear(2, 2)
    registry = Registry.installed().with_plugins(SharedSequences)
    with patch.object(Registry, "installed", lambda: registry):
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            config={"train_micro_batch_size_per_gpu": 1, "sequence_parallel_size": 2},
        )
    shared = torch.tensor([rank + 1.0])
    assert groups._get_sequence_parallel_world_size() == 2
    comm.all_reduce(shared, group=groups._get_sequence_parallel_group())
    single = torch.tensor([rank + 1.0])
    comm.all_reduce(single, group=engine.data_parallel_group)
    sizes = groups.get_data_parallel_world_size(), groups.get_sequence_parallel_world_size()
    everything = comm.get_all_ranks_from_group(groups.get_sequence_data_parallel_group())
    engine.destroy()
    return {
        "rank": (rank, comm.get_world_size(), comm.get_local_rank()),
        "before": before,
        "alone": alone.item(),
        "several": [t.item() for t in several],
        "gathered": [t.tolist() for t in gathered],
        "part": part.item(),
        "shared": shared.item(),
        "single": single.item(),
        "sizes": sizes,
        "everything": everything,
    }


def test_collectives_and_groups_of_two_ranks():
    for rank, found in enumerate(run_distributed(on_two_ranks, 2)):
        assert found == {
            "rank": (rank, 2, rank),
            "before": (2, 1),
            "alone": rank + 1.0,  # a group of one rank, not of all
            "several": [3.0, 10.0],
            "gathered": [[0.0, 1.0], [5.0, 5.0, 6.0, 6.0]],
            "part": 2.0 * (rank + 1),
            "shared": 3.0,
            "single": rank + 1.0,
            "sizes": (1, 2),
            "everything": [0, 1],
        }


def test_ranks_of_mpi_are_taken_where_no_launcher_gives_any(monkeypatch):
    from deepspeed._parts.comm import _from_mpi

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4")
    _from_mpi()
    taken = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    assert list(taken.values()) == ["3", "4", "3", "127.0.0.1"]


def test_before_there_is_a_process_group_ranks_are_the_environments(monkeypatch):
    assert not comm.is_initialized()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (comm.get_rank(), comm.get_world_size()) == (1, 2)
    comm.init_distributed(dist_init_required=False)
    assert not comm.is_initialized()


def test_the_accelerator_speaks_as_deepspeeds_does():
    accelerator = get_accelerator()
    assert deepspeed.get_accelerator() is accelerator
    if accelerator.device_name() != "cpu":
        pytest.skip("this machine computes on a device")
    assert accelerator.current_device_name() == "cpu"
    assert accelerator.communication_backend_name().startswith("gloo") or accelerator.device_name()
    assert accelerator.is_available()
    assert accelerator.is_bf16_supported()
    assert accelerator.FloatTensor([1, 2]).dtype == torch.float32
    assert accelerator.on_accelerator(torch.ones(1))
    assert accelerator.total_memory() > accelerator.memory_allocated() > 0
    assert accelerator.create_op_builder("CPUAdamBuilder").NAME == "cpu_adam"
    assert accelerator.create_op_builder("Nothing") is None
    assert accelerator.Stream() is None
    with accelerator.stream(None), accelerator.device(0):
        accelerator.synchronize()
    accelerator.manual_seed(3)
    state = accelerator.get_rng_state()
    first = torch.rand(2)
    accelerator.set_rng_state(state)
    assert torch.equal(first, torch.rand(2))
    with pytest.raises(AttributeError, match="'cpu' has no 'nothing'"):
        accelerator.nothing  # noqa: B018


def test_recomputation_gives_the_same_gradients():
    checkpointing = deepspeed.checkpointing
    checkpointing.configure(None, num_checkpoints=4, contiguous_checkpointing=True)
    assert checkpointing.is_configured()
    layer = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
    inputs = torch.randn(4, 3, requires_grad=True)
    gradients = []
    for run in (checkpointing.checkpoint, checkpointing.non_reentrant_checkpoint, None):
        torch.manual_seed(1)
        out = layer(inputs) if run is None else run(layer, inputs)
        gradients.append(
            torch.autograd.grad(out.square().sum(), inputs)[0] if run is None else None
        )
        if run is not None:
            out.square().sum().backward()
            gradients[-1], inputs.grad = inputs.grad, None
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[1], gradients[2])
    assert checkpointing.get_cuda_rng_tracker is not None


def test_builders_tell_what_there_is(monkeypatch):
    from deepspeed.ops.op_builder import CPUAdamBuilder, QuantizerBuilder

    builder = CPUAdamBuilder()
    assert builder.is_compatible()
    assert builder.load().FusedAdam is deepspeed.ops.adam.FusedAdam
    monkeypatch.setenv("DRIVETRAIN_DISABLE_PLUGINS", "drivetrain-zero")
    assert not QuantizerBuilder().is_compatible()
    with pytest.raises(
        PluginError, match="quantizer needs zero_optimization, which nothing serves"
    ):
        QuantizerBuilder().load()


def test_modules_are_constructed_in_another_dtype_or_without_values():
    with deepspeed.OnDevice(dtype=torch.bfloat16, device="meta"):
        layer = torch.nn.Linear(2, 2)
    assert (layer.weight.dtype, layer.weight.device.type) == (torch.bfloat16, "meta")
    with deepspeed.OnDevice(dtype=torch.float16, enabled=False):
        assert torch.nn.Linear(2, 2).weight.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(1).device.type == "cpu"


def test_messages_are_logged_on_the_ranks_asked_for(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with caplog.at_level(logging.INFO, logger="deepspeed"):
        log_dist("mine", ranks=[1])
        log_dist("another's", ranks=[0])
        log_dist("everybody's")
        for _ in range(2):
            log_dist_once("once", (-1,))
    assert [r.getMessage() for r in caplog.records] == [
        "[rank 1] mine",
        "[rank 1] everybody's",
        "[rank 1] once",
    ]
    assert logger is logging.getLogger("deepspeed")


def test_small_helpers(tmp_path, caplog):
    large = torch.zeros(1000)
    copied = clone_tensors_for_torch_save({"a": [large[:2]], "b": (1, large[2:4])})
    assert copied["a"][0].untyped_storage().nbytes() == 8
    assert copied["b"][0] == 1
    moved = move_to_device({"x": [torch.ones(1), "text"]}, "meta")
    assert moved["x"][0].is_meta
    assert moved["x"][1] == "text"
    ensure_directory_exists(str(tmp_path / "a" / "b" / "file"))
    assert (tmp_path / "a" / "b").is_dir()
    assert required_torch_version(min_version=2.0)
    assert deepspeed.elasticity.elasticity_enabled({"elasticity": {"enabled": True}})
    assert not deepspeed.elasticity.elasticity_enabled({})
    partition = deepspeed.runtime.zero.partition_parameters
    assert partition.zero_wrapper_for_fp_tensor_constructor(torch.arange) is torch.arange
    assert not required_torch_version(max_version="1.13")
    with caplog.at_level(logging.INFO, logger="deepspeed"):
        see_memory_usage("quiet")
        see_memory_usage("after the first step", force=True)
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("after the first step: device ")


def with_switches():
    from deepspeed.comm import torch as switches

    from drivetrain.contracts import Purpose, Tag
    from drivetrain.errors import CommunicationError

    with pytest.raises(CommunicationError, match="all_reduce_comm_off needs an open job"):
        switches.all_reduce_comm_off(True)
    torch.manual_seed(0)
    engine, *_ = deepspeed.initialize(
        model=torch.nn.Linear(2, 2),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        },
    )
    rank, found = comm.get_rank(), []
    for flag in (False, True, False):
        switches.backward_comm_off(flag)
        with torch.no_grad():
            engine.module.weight.fill_(1.0)
        engine.backward((engine(torch.full((1, 2), float(rank))) * 2).sum())
        engine.step()
        found.append(engine.module.weight[0, 0].item())
    switches.broadcast_comm_off(True)
    tensors = [torch.tensor([float(rank)]) for _ in range(2)]
    for tensor, purpose in zip(tensors, (Purpose.STATE, Purpose.CONTROL), strict=True):
        engine.job.communicator.broadcast(tensor, "world", Tag(purpose), source=1)
    engine.destroy()
    return found, [tensor.item() for tensor in tensors]


def test_a_kind_of_collective_can_be_switched_off_to_see_what_it_costs():
    (first, kept), (second, _) = run_distributed(with_switches, 2)
    # The gradient of rank r is 2 r; their mean is 1. Without a sum each divides its own by two.
    assert first == pytest.approx([0.9, 1.0, 0.9])
    assert second == pytest.approx([0.9, 0.9, 0.9])
    assert kept == [0.0, 1.0]  # ranks still agree on what they have to


def test_calls_are_written_as_python_writes_them():
    assert deepspeed.runtime.utils.call_to_str("run", 3, "a", val=None) == "run(3, 'a', val=None)"


class TwoParts:
    """A model-parallel unit of two ranks."""

    @staticmethod
    def get_model_parallel_rank():
        return comm.get_rank()

    @staticmethod
    def get_model_parallel_group():
        return comm.get_world_group()


def clipped(order):
    comm.init_distributed(verbose=False)
    shared, part = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    part.model_parallel = True
    shared.grad = torch.tensor([1.0, 2.0])  # the same on both ranks
    part.grad = torch.tensor([4.0, 2.0]) * (1 + comm.get_rank())
    norm = deepspeed.runtime.utils.clip_grad_norm_([shared, part], 1.0, order, mpu=TwoParts)
    return norm.item(), shared.grad, part.grad


@pytest.mark.parametrize("order", [2.0, float("inf")])
def test_gradients_of_a_scripts_own_are_clipped_over_the_parts_of_a_model(order):
    whole = torch.tensor([1.0, 2.0, 4.0, 2.0, 8.0, 4.0])
    norm = torch.linalg.vector_norm(whole, order).item()
    for rank, (found, shared, part) in enumerate(run_distributed(clipped, 2, order)):
        assert found == pytest.approx(norm)
        torch.testing.assert_close(shared, whole[:2] / norm)
        torch.testing.assert_close(part, whole[2 + 2 * rank : 4 + 2 * rank] / norm)
    alone = torch.nn.Parameter(torch.zeros(2))
    alone.grad = torch.tensor([3.0, 4.0])
    assert deepspeed.runtime.utils.clip_grad_norm_(alone, 10.0).item() == 5.0
    assert alone.grad.tolist() == [3.0, 4.0]


def clipped_on_one_rank(order):
    comm.init_distributed(verbose=False)
    weights = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    if comm.get_rank() == 0:
        weights.grad = torch.full((4,), 60000.0, dtype=torch.float16)
    norm = deepspeed.runtime.utils.clip_grad_norm_(weights, 1e-3, order, mpu=TwoParts)
    broken = torch.nn.Parameter(torch.zeros(2))
    if comm.get_rank() == 0:
        broken.grad = torch.tensor([1.0, float("nan")])
    bad = deepspeed.runtime.utils.clip_grad_norm_(broken, 1.0, order, mpu=TwoParts)
    return norm.item(), weights.grad, bad.item()


@pytest.mark.parametrize("order", [2.0, float("inf")])
def test_a_norm_that_float16_has_no_number_for_clips_as_it_is(order):
    values = torch.full((4,), 60000.0, dtype=torch.float64)
    expected = torch.linalg.vector_norm(values, order)
    for rank, (norm, gradient, bad) in enumerate(run_distributed(clipped_on_one_rank, 2, order)):
        assert norm == pytest.approx(expected.item(), rel=1e-6)
        assert bad != bad
        if rank == 0:
            torch.testing.assert_close(
                gradient.double(), values / expected * 1e-3, rtol=1e-3, atol=0.0
            )


@pytest.mark.parametrize("order", [2.0, float("inf")])
@pytest.mark.parametrize("last", [4.0, float("inf"), float("nan")])
def test_norms_that_are_not_finite_are_treated_as_torch_does(order, last):
    ours, torchs = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    ours.grad, torchs.grad = torch.tensor([3.0, last]), torch.tensor([3.0, last])
    found = deepspeed.runtime.utils.clip_grad_norm_(ours, 1.0, order)
    expected = torch.nn.utils.clip_grad_norm_(torchs, 1.0, order)
    torch.testing.assert_close(found, expected, equal_nan=True)
    torch.testing.assert_close(ours.grad, torchs.grad, equal_nan=True)


@pytest.mark.parametrize("level", [None, "ERROR"])
def test_a_config_sets_the_level_of_the_logger(level, monkeypatch):
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    config = (
        {"train_batch_size": 1} if level is None else {"train_batch_size": 1, "log_level": level}
    )
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    assert engine.log_level() == deepspeed.runtime.config.get_log_level(config) == level
    assert logger.getEffectiveLevel() == (logging.DEBUG if level is None else logging.ERROR)
    engine.destroy()
    logger.setLevel(logging.DEBUG)  # which forgets what loggers know of their levels


@pytest.mark.parametrize("level", [20, "loud", ["info"]])
def test_what_is_no_level_of_the_logger_is_refused(level):
    with pytest.raises(ConfigError, match=r"log level .* is none of debug, info"):
        set_log_level_from_string(level)


def in_stretches(shape):
    comm.init_distributed(verbose=False)
    whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    part = PartitionedTensor(whole, group=comm.new_group([0, 1]))
    again = PartitionedTensor.from_meta(part.to_meta(), part.data(), part.group)
    assert again.full_size() == part.full_size() == list(shape)
    return part.local_data, part.full(), again.full("cpu")


@pytest.mark.parametrize(
    ("shape", "stretches"),
    [
        ((2, 3), ([0.0, 1.0, 2.0], [3.0, 4.0, 5.0])),
        ((5,), ([0.0, 1.0, 2.0], [3.0, 4.0])),
        ((), ([0.0], [])),
    ],
)
def test_a_tensor_in_stretches_is_made_whole_again(shape, stretches):
    expected = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    for found, stretch in zip(run_distributed(in_stretches, 2, shape), stretches, strict=True):
        local, whole, again = found
        assert local.tolist() == stretch
        assert torch.equal(whole, expected)
        assert torch.equal(again, expected)
