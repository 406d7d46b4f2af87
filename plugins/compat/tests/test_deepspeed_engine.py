"""``deepspeed.initialize`` and what its engine adds to Drivetrain's."""

from __future__ import annotations

import copy
import logging
from argparse import ArgumentParser, Namespace
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed._training.settings import SETTINGS, SHARED

from drivetrain.errors import CheckpointError, ConfigError, TrainingError
from drivetrain.job.job import Job
from drivetrain.monitor import Monitor
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed

CONFIG = {"train_batch_size": 4, "gradient_clipping": 0.0, "zero_optimization": {"stage": 1}}


def model():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 2)


@pytest.fixture
def build():
    """Engines that are destroyed after the test."""
    engines = []

    def make(config=CONFIG, module=None, **arguments):
        module = module or model()
        made = deepspeed.initialize(model=module, config=config, **arguments)
        engines.append(made[0])
        return made

    yield make
    for engine in engines:
        engine.destroy()


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def update(engine):
    inputs = torch.ones(4, 4)
    engine.backward(engine(inputs).square().mean())
    engine.step()
    return [p.detach().clone() for p in engine.module.parameters()]


# -- arguments -----------------------------------------------------------------------------------


def test_a_config_may_come_in_every_way_but_only_once(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"train_batch_size": 4,} // a comment')
    parser = deepspeed.add_config_arguments(ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path)])
    old = Namespace(deepscale_config=str(path), local_rank=0)
    for arguments in (
        {"args": args},
        {"args": old},
        {"config": str(path)},
        {"config_params": {"train_batch_size": 4}},
    ):
        engine, optimizer, loader, schedule = deepspeed.initialize(model=model(), **arguments)
        assert (optimizer, loader, schedule) == (None, None, None)
        assert engine.train_batch_size() == 4
        engine.destroy()
    with pytest.raises(ConfigError, match=r"more than once: config and args\.deepspeed_config"):
        deepspeed.initialize(args=args, model=model(), config=CONFIG)
    with pytest.raises(ConfigError, match="needs a config: config=, a dict"):
        deepspeed.initialize(model=model())


def test_lines_about_a_config_are_logged_once(build, caplog):
    with caplog.at_level(logging.INFO, logger="deepspeed"):
        build({**CONFIG, "disable_python_gc": True, "typo": 1})
    lines = [r.getMessage() for r in caplog.records if r.name == "deepspeed"]
    assert [line.split(",")[0] for line in lines] == [
        "config: disable_python_gc: no effect",
        "config: typo: DeepSpeed has no such key and never looks at it",
    ]


# -- the engine ----------------------------------------------------------------------------------


def test_an_engine_has_what_frameworks_read(build):
    module = model()
    engine, optimizer, *_ = build(module=module, optimizer=sgd(module))
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    assert isinstance(optimizer, deepspeed.DeepSpeedOptimizer)
    assert (engine.local_rank, engine.global_rank, engine.world_size) == (0, 0, 1)
    assert (engine.mp_world_size, engine.get_data_parallel_rank()) == (1, 0)
    assert engine.get_batch_info() == (4, 4, 1)
    assert engine.config == CONFIG
    assert engine._config.zero_config.stage == 1
    assert engine.zero_optimization_stage() == 1
    assert engine.zero_optimization()
    assert not engine.zero_optimization_partition_gradients()
    assert not engine.zero_optimization_partition_weights()
    assert engine.zero_offload_optimizer() is None
    assert not engine.zero_cpu_offload()
    assert engine.optimizer_name() == "SGD"
    assert engine.scheduler_name() is None
    assert engine.get_data_types() == (torch.float32, torch.float32)
    assert engine.communication_data_type is None
    assert (engine.loss_scale(), engine.dynamic_loss_scale()) == (1.0, False)
    assert not engine.is_compiled
    engine.set_lr(0.5)
    assert engine.get_lr() == [0.5]
    assert not hasattr(engine, "nothing")


def test_the_norm_of_the_first_step_is_there_unless_the_config_leaves_it_out(build):
    for wanted in (True, False):
        module = model()
        config = {**CONFIG, "compute_grad_norm": wanted}
        engine, *_ = build(config, module, optimizer=sgd(module))
        update(engine)
        norm = engine.get_global_grad_norm()
        assert (norm is not None) == wanted
    assert engine.global_steps == 1


def test_the_engines_timer_counts_steps_from_its_first_use_on(build):
    config = {**CONFIG, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    engine, *_ = build({**config, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    update(engine)
    timer = engine.tput_timer
    assert timer is engine.tput_timer
    assert timer.batch_size == 4
    for _ in range(7):
        update(engine)
    assert (timer.global_step_count, timer.micro_step_count) == (4, 7)
    assert timer.avg_samples_per_sec() > 0
    assert engine.global_steps == 4


def test_a_timer_that_the_config_turns_off_counts_nothing(build):
    engine, *_ = build(
        {
            **CONFIG,
            "timers": {"throughput": {"enabled": False}},
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        }
    )
    timer = engine.tput_timer
    update(engine)
    assert timer.micro_step_count == 0


def test_every_setting_is_a_method(build):
    engine, *_ = build()
    assert [name for name in SHARED if not hasattr(engine, name)] == []
    values = {name: getattr(engine, name)() for name in SETTINGS}
    assert values["fp16_enabled"] is False
    assert values["zero_reduce_scatter"] is True
    assert values["zero_allgather_bucket_size"] == 500_000_000
    assert values["flops_profiler_enabled"] is False  # of a package that does not exist yet


def test_the_optimizer_tells_of_loss_scale_and_overflow(build):
    config = {**CONFIG, "fp16": {"enabled": True, "initial_scale_power": 4}}
    module = model()
    engine, optimizer, *_ = build(config, module, optimizer=sgd(module))
    assert engine.fp16_enabled()
    assert (optimizer.cur_scale, optimizer.loss_scale, optimizer.dynamic_loss_scale) == (
        16,
        16,
        True,
    )
    assert optimizer.optimizer is optimizer
    optimizer.backward(engine(torch.ones(4, 4, dtype=torch.float16)).sum() * float("inf"))
    engine.step()
    assert optimizer.overflow
    assert engine.skipped_steps == 1


def test_hooks_may_be_taken_away_and_put_back_around_generation(build):
    module = model()
    engine, optimizer, *_ = build(module=module, optimizer=sgd(module))
    hooks = optimizer.parameter_offload
    assert [*hooks.module.named_parameters(), *hooks.module.ds_external_parameters()] == []
    assert hooks.forward_hooks == hooks.backward_hooks == []
    hooks._register_deepspeed_module(hooks.module)
    update(engine)


def test_numbers_of_a_script_go_to_the_monitors(build):
    class Notes(Monitor):
        name = "notes"
        written = []

        def open_writer(self, engine, number):
            return Namespace(write=Notes.written.extend, flush=lambda: None, close=lambda: None)

    module = model()
    registry = Registry.installed().with_plugins(Notes)
    job = Job.open(Plan.build({**CONFIG, "plugins": {"notes": True}}, registry=registry))
    engine = job.engine(module, sgd(module), engine_type=deepspeed.DeepSpeedEngine)
    assert engine.monitor.enabled
    engine.monitor.write_events([("mine", 2.0, 8)])
    job.close()
    assert [tuple(event) for event in Notes.written] == [("mine", 2.0, 8)]
    plain, *_ = build()
    assert not plain.monitor.enabled
    plain.monitor.write_events([("mine", 2.0, 8)])


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (
            lambda p: deepspeed.ops.adam.FusedAdam(p, lr=0.01, weight_decay=0.1),
            lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        ),
        (
            lambda p: deepspeed.ops.adam.FusedAdam(p, lr=0.01, weight_decay=0.1, adam_w_mode=False),
            lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
        ),
        (
            lambda p: deepspeed.ops.adam.DeepSpeedCPUAdam(p, lr=0.01, betas=(0.8, 0.9)),
            lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.9), weight_decay=0.0),
        ),
        (
            lambda p: deepspeed.ops.adagrad.DeepSpeedCPUAdagrad(p, lr=0.01),
            lambda p: torch.optim.Adagrad(p, lr=0.01),
        ),
    ],
)
def test_optimizers_step_in_an_engine_and_alone_as_those_of_torch_do(build, make, plain):
    module, alone, reference = model(), model(), model()
    engine, *_ = build(module=module, optimizer=make(module.parameters()))
    optimizers = [make(alone.parameters()), plain(reference.parameters())]
    for _ in range(3):
        values = update(engine)
        for net, optimizer in zip((alone, reference), optimizers, strict=True):
            optimizer.zero_grad()
            net(torch.ones(4, 4)).square().mean().backward()
            optimizer.step()
    for ours, its_own, expected in zip(
        values, alone.parameters(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(its_own, expected)
        torch.testing.assert_close(ours, expected.detach())


def test_lion_and_lamb_are_rules_of_the_engine_and_step_alone_by_them(build):
    for kind in (deepspeed.ops.lion.FusedLion, deepspeed.ops.lamb.FusedLamb):
        module, alone = model(), model()
        optimizer, its_own = (kind(net.parameters(), lr=0.01) for net in (module, alone))
        engine, held, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=CONFIG)
        for _ in range(2):
            after = update(engine)
            its_own.zero_grad()
            alone(torch.ones(4, 4)).square().mean().backward()
            its_own.step()
        for ours, expected in zip(alone.parameters(), after, strict=True):
            torch.testing.assert_close(ours.detach(), expected)
        assert held.param_groups is not optimizer.param_groups
        assert held.param_groups[0] is optimizer.param_groups[0]
        engine.destroy()


def test_moments_of_low_precision_weights_are_as_wide_as_adam_is_asked():
    for wide, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        weights = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        adam = deepspeed.ops.adam.DeepSpeedCPUAdam(
            [weights], lr=0.5, eps=0.0, fp32_optimizer_states=wide
        )
        weights.grad = torch.full_like(weights, 3.0)
        adam.step()
        assert adam.state[weights]["exp_avg"].dtype == dtype
        torch.testing.assert_close(weights.detach(), torch.full_like(weights, 0.5))


def test_the_optimizer_of_a_config_is_known_by_deepspeeds_class(build):
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lion import FusedLion

    for wanted, config in (
        ({FusedAdam}, {"optimizer": {"type": "AdamW"}}),
        ({FusedLion}, {"optimizer": {"type": "Lion"}}),
        (set(), {"optimizer": {"type": "Adam", "params": {"torch_adam": True}}}),
        (
            {DeepSpeedCPUAdam},
            {
                "optimizer": {"type": "Adam"},
                "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
            },
        ),
    ):
        engine, optimizer, *_ = deepspeed.initialize(model=model(), config=CONFIG | config)
        known = (DeepSpeedCPUAdam, FusedAdam, FusedLion)
        assert {kind for kind in known if isinstance(optimizer, kind)} == wanted
        engine.destroy()


def test_lion_follows_its_formula(build):
    module, reference = model(), model()
    lion = deepspeed.ops.lion.DeepSpeedCPULion(module.parameters(), lr=0.01, weight_decay=0.1)
    engine, *_ = build(module=module, optimizer=lion)
    reference(torch.ones(4, 4)).square().mean().backward()
    for value, start in zip(update(engine), reference.parameters(), strict=True):
        expected = start.detach() * (1 - 0.01 * 0.1) - 0.01 * start.grad.sign()
        torch.testing.assert_close(value, expected)


def test_what_no_group_holds_reaches_the_rule(build):
    module, reference = model(), model()
    adam = deepspeed.ops.adam.FusedAdam(
        module.parameters(), lr=0.01, bias_correction=False, eps=0.0
    )
    engine, *_ = build(module=module, optimizer=adam)
    reference(torch.ones(4, 4)).square().mean().backward()
    for value, start in zip(update(engine), reference.parameters(), strict=True):
        step = (1 - 0.9) / (1 - 0.999) ** 0.5  # moments that begin at zero, as they are
        torch.testing.assert_close(value, start.detach() - 0.01 * step * start.grad.sign())


def test_what_an_optimizer_cannot_do_is_refused():
    parameters = list(model().parameters())
    with pytest.raises(ConfigError, match="amsgrad is not supported"):
        deepspeed.ops.adam.FusedAdam(parameters, amsgrad=True)
    with pytest.raises(ConfigError, match="max_grad_norm is not supported; use gradient_clipping"):
        deepspeed.ops.lamb.FusedLamb(parameters, max_grad_norm=1.0)
    alone = deepspeed.runtime.fp16.onebit.OnebitAdam(parameters)
    with pytest.raises(TrainingError, match="OnebitAdam steps through an engine"):
        alone.step()


def test_the_optimizer_tells_its_loss_scale_as_it_is_now(build):
    fp16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
    module = model()
    engine, optimizer, *_ = build(CONFIG | {"fp16": fp16}, module, optimizer=sgd(module))
    scale = optimizer.loss_scaler
    told = (scale.cur_scale, scale.scale_window, scale.min_scale, scale.delayed_shift)
    assert told == (256.0, 2, 1.0, 1)
    for _ in range(3):
        engine.backward(engine(torch.ones(4, 4).half()).square().mean())
        engine.step()
    assert (optimizer.loss_scale_config.cur_scale, scale.cur_iter) == (512.0, 3)
    assert scale.dynamic


def test_flat_masters_of_groups_are_copies(build):
    module = model()
    groups = [{"params": [module.weight]}, {"params": [module.bias]}]
    config = CONFIG | {"bf16": {"enabled": True}}
    engine, optimizer, *_ = build(config, module, optimizer=torch.optim.SGD(groups, lr=0.1))
    weight, bias = optimizer.fp32_partitioned_groups_flat
    assert (weight.dtype, weight.numel(), bias.numel()) == (torch.float32, 8, 2)
    torch.testing.assert_close(weight, model().weight.detach().flatten())
    before = weight.clone()
    engine.backward(engine(torch.ones(4, 4).bfloat16()).square().mean())
    engine.step()
    assert torch.equal(weight, before)
    assert not torch.equal(optimizer.single_partition_of_fp32_groups[0], before)


# -- checkpoints ---------------------------------------------------------------------------------


def test_saving_and_loading_take_and_return_what_deepspeed_does(build, tmp_path):
    module = model()
    engine, *_ = build(module=module, optimizer=sgd(module))
    saved = update(engine)
    assert engine.load_checkpoint(str(tmp_path)) == (None, None)
    assert engine.save_checkpoint(tmp_path, 7, {"epoch": 3}, True) is True
    update(engine)
    path, client = engine.load_checkpoint(tmp_path)
    assert (Path(path), client) == (tmp_path / "7", {"epoch": 3})
    for value, expected in zip(engine.module.parameters(), saved, strict=True):
        assert torch.equal(value, expected)
    with pytest.raises(ConfigError, match="custom_load_fn is not supported"):
        engine.load_checkpoint(tmp_path, custom_load_fn=print)


def test_a_client_state_may_hold_tensors_but_no_objects(build, tmp_path):
    module = model()
    engine, *_ = build(module=module, optimizer=sgd(module))
    given = {"best": torch.tensor(0.5), "callbacks": {3: (1, 2)}, "epoch": 3}
    engine.save_checkpoint(tmp_path, "tensors", client_state=given)
    assert engine.load_checkpoint(tmp_path)[1] == given
    with pytest.raises(CheckpointError, match=r"client_state.args \(Namespace\)"):
        engine.save_checkpoint(tmp_path, "objects", client_state={"args": Namespace(lr=1)})


def test_weights_are_written_for_torch_load_and_as_safetensors(build, tmp_path):
    module = model()
    module.bias.requires_grad_(False)
    engine, *_ = build(module=module, optimizer=torch.optim.SGD([module.weight], lr=0.1))
    assert engine.save_16bit_model(tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert torch.equal(state["weight"], module.weight)
    assert engine.save_16bit_model(tmp_path, "model.safetensors", exclude_frozen_parameters=True)
    assert (tmp_path / "model.safetensors").exists()
    assert set(engine._zero3_consolidated_16bit_state_dict()) == {"weight", "bias"}
    assert set(engine.module_state_dict(exclude_frozen_parameters=True)) == {"weight"}
    engine.load_module_state_dict({"module": {"weight": torch.ones(2, 4), "bias": torch.ones(2)}})
    assert torch.equal(module.weight, torch.ones(2, 4))


def test_a_prefix_may_be_given_by_place_where_frozen_parameters_are_left_out(build):
    module = model()
    module.bias.requires_grad_(False)
    engine, *_ = build(module=module, optimizer=torch.optim.SGD([module.weight], lr=0.1))
    for state in (
        engine.module_state_dict(None, "m.", exclude_frozen_parameters=True),
        engine.module_state_dict(prefix="m.", exclude_frozen_parameters=True),
    ):
        assert set(state) == {"m.weight"}


# -- without an engine, and beside it --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["DeepSpeedCPUAdam", "DeepSpeedCPULion"])
def test_a_resume_of_an_optimizer_alone_has_the_states_as_they_were(kind):
    wide = kind == "DeepSpeedCPUAdam"
    make = getattr(deepspeed.ops.adam if wide else deepspeed.ops.lion, kind)

    def optimizer(values):
        weights = torch.nn.Parameter(values.clone())
        return weights, make([weights], lr=0.01)

    def update(weights, made):
        weights.grad = torch.linspace(-1, 1, 8).to(weights)
        made.step()

    start = torch.linspace(1, 2, 8, dtype=torch.bfloat16)
    first, adam = optimizer(start)
    update(first, adam)
    update(first, adam)
    again, other = optimizer(first.detach())
    other.load_state_dict(adam.state_dict())
    for name, value in adam.state[first].items():
        loaded = other.state[again][name]
        assert type(loaded) is type(value)
        if isinstance(value, torch.Tensor):
            assert value.dtype == (torch.float32 if wide else torch.bfloat16)
            assert loaded.dtype == value.dtype
            assert torch.equal(loaded, value)
    update(first, adam)
    update(again, other)
    assert torch.equal(first, again)


def trained_by_one_backward():
    """Weights of two engines and of plain modules, after two steps on a sum of losses."""
    torch.manual_seed(0)
    modules = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)]
    twins = copy.deepcopy(modules)
    engines = []
    for stage, module in zip((1, 3), modules, strict=True):
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero}
        config["gradient_clipping"] = 0.0
        engines.append(deepspeed.initialize(model=module, config=config, optimizer=sgd(module))[0])
    plain = [sgd(twin) for twin in twins]
    rank, ranks = engines[0].global_rank, engines[0].world_size
    for step in range(2):
        inputs = torch.arange(16.0 * ranks).view(ranks, 4, 4) / (10 + step)
        for engine in engines:
            engine._backward_prologue()
        sum(engine(inputs[rank]).square().mean() for engine in engines).backward()
        for engine in engines:
            engine._backward_epilogue()
            engine.step()
        sum(twin(inputs).square().mean() for twin in twins).backward()
        for optimizer in plain:
            optimizer.step()
            optimizer.zero_grad()
    found = [
        (dict(engine.module_state_dict()), twin.state_dict())
        for engine, twin in zip(engines, twins, strict=True)
    ]
    for engine in engines:
        engine.destroy()
    return found


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_engines_of_several_stages_share_one_backward(build, ranks):
    train = trained_by_one_backward
    for found in [train()] if ranks == 1 else run_distributed(train, ranks):
        for weights, expected in found:
            for name, value in expected.items():
                torch.testing.assert_close(weights[name], value)
    reader, *_ = build(module=model())
    with pytest.raises(TrainingError, match="no optimizer, so it cannot run backward"):
        reader._backward_epilogue()
