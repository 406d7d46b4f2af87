"""The one call that most scripts need: config and model in, engine out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from drivetrain.communication.process_group import Ranks
from drivetrain.engine.compose import ClientOptimizer, plugins_of_objects, require_module
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan

if TYPE_CHECKING:
    from torch import nn

    from drivetrain.engine.loader import DataLoader
    from drivetrain.modules.materialize import WeightSource
    from drivetrain.optimization.facade import EngineOptimizer
    from drivetrain.plan.registry import Registry

ConfigSource = Mapping[str, Any] | str | os.PathLike[str]


def initialize(
    args: Any | None = None,
    model: nn.Module | None = None,
    optimizer: ClientOptimizer | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any | None = None,
    lr_scheduler: Any | None = None,
    distributed_port: int | None = None,
    mpu: Any | None = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: ConfigSource | None = None,
    mesh_param: tuple[int, int] | None = None,
    config_params: ConfigSource | None = None,
    *,
    weights: WeightSource | None = None,
    overlays: Iterable[str] = (),
    registry: Registry | None = None,
    engine_type: type[Engine] = Engine,
) -> tuple[Engine, EngineOptimizer | None, DataLoader | None, Any | None]:
    """Build an engine for a model. Collective: every rank makes the same call.

    The arguments are those of ``deepspeed.initialize``.

    Args:
        args: namespace whose ``deepspeed_config`` is the config, if ``config`` is not given.
        model: the module to train; changed in place.
        optimizer: a torch optimizer, or a callable that makes one; overrides the config's.
        model_parameters: what the config's optimizer trains; all parameters by default.
        training_data: dataset for the returned loader.
        lr_scheduler: a schedule, or a callable that makes one from the optimizer.
        distributed_port: port of the rendezvous, where ``MASTER_PORT`` is not set.
        mpu: object with the getters of a model-parallel unit, whose process groups are used; the
            model itself shares out sequences, where the config has ``sequence_parallel_size``.
        dist_init_required: accepted; the process group is started exactly if there is none.
        collate_fn: makes a micro-batch of a list of samples.
        config: dict, path to JSON or YAML, or base64-url JSON.
        mesh_param: (data-parallel size, sequence-parallel size).
        config_params: older name of ``config``.
        weights: where parameters and buffers on the meta device get values from: a checkpoint,
            safetensors files, a mapping, or a callable ``(name, tensor, generator)``. By default
            their modules' ``reset_parameters()``; see
            :func:`~drivetrain.modules.materialize.materialize`.
        overlays: ``path=value`` assignments on top of the config.
        registry: where plugins come from; everything installed by default.
        engine_type: subclass of ``Engine`` to build.

    Returns:
        Engine, optimizer, loader and schedule; the last three may be ``None``.

    Raises:
        ConfigError: with every problem of the config at once.
        PluginError: a plugin that the config names cannot be used.
        CommunicationError: the ranks did not come together.
        CheckpointError: ``weights`` do not fit the model, or are damaged.
    """
    module = require_module(model)
    source = _one_config(args, config, config_params)
    if distributed_port is not None:
        os.environ.setdefault("MASTER_PORT", str(distributed_port))
    ranks = Ranks.current()
    plan = Plan.build(
        source,
        overlays=[*overlays, *(getattr(args, "overlays", None) or ()), *_sizes(mesh_param)],
        world_size=ranks.world_size,
        registry=registry,
        serves_axes=() if mpu is None else ("sp",),
        objects=plugins_of_objects(module),
    )
    job = Job.open(plan, ranks, mpu=mpu)
    try:
        engine = job.engine(
            module,
            optimizer,
            parameters=model_parameters,
            scheduler=lr_scheduler,
            training_data=training_data,
            collate_fn=collate_fn,
            weights=weights,
            engine_type=engine_type,
        )
    except BaseException as error:
        job.fail(error)
        raise
    engine.on_destroy(job.close)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _sizes(mesh_param: tuple[int, int] | None) -> list[str]:
    if mesh_param is None:
        return []
    return [f"data_parallel_size={mesh_param[0]}", f"sequence_parallel_size={mesh_param[1]}"]


def _one_config(
    args: Any | None, config: ConfigSource | None, config_params: ConfigSource | None
) -> ConfigSource:
    given = {
        "config": config,
        "config_params": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
    }
    sources = {name: source for name, source in given.items() if source is not None}
    if len(sources) == 1:
        return next(iter(sources.values()))
    if not sources:
        raise ConfigError("initialize needs a config: a dict, or the path of a JSON or YAML file")
    raise ConfigError(f"the config is given more than once: {' and '.join(sources)}; give one")
