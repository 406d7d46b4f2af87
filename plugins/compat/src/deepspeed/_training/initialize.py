"""``deepspeed.initialize``, in every form in which scripts call it."""

from __future__ import annotations

import logging
import os
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist

from deepspeed._config.files import ConfigSource, read_config
from deepspeed._config.sections import get_log_level
from deepspeed._config.translate import Translation, translate
from deepspeed._parts.errors import AsDeepSpeed
from deepspeed._parts.logs import set_log_level_from_string
from deepspeed._parts.optimizers import Described
from deepspeed._parts.parameters import show_attributes
from deepspeed._training.engine import DeepSpeedEngine
from deepspeed._training.optimizer import DeepSpeedOptimizer
from drivetrain.communication.process_group import Ranks
from drivetrain.engine.initialize import initialize as build
from drivetrain.errors import ConfigError
from drivetrain.plan.config.arguments import add_config_arguments as add_arguments

if TYPE_CHECKING:
    from torch import nn

    from drivetrain.engine.loader import DataLoader

logger = logging.getLogger("deepspeed")


@AsDeepSpeed()
def initialize(
    args: Any | None = None,
    model: nn.Module | None = None,
    optimizer: Any | None = None,
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
) -> tuple[DeepSpeedEngine, DeepSpeedOptimizer | None, DataLoader | None, Any | None]:
    """Build an engine for a model; see :func:`drivetrain.initialize`. Collective.

    Returns:
        Engine, optimizer, loader and schedule; the last three may be ``None``.

    Raises:
        ConfigError: with every problem of the config at once; or ranks are not connected, and
            ``dist_init_required`` is false.
        PluginError: a plugin that the config names cannot be used.
        CommunicationError: the ranks did not come together.
    """
    if dist_init_required is False:
        _refuse_unconnected(Ranks.current().world_size)
    source = _one_config(args, config, config_params)
    given = read_config(source)
    done = translate(given)
    _tell(given, done)
    local_rank = getattr(args, "local_rank", None)
    if isinstance(local_rank, int) and local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if isinstance(optimizer, Described):
        done.config["optimizer"] = {"type": optimizer.type_name, "params": optimizer.params}
        model_parameters, optimizer = optimizer.param_groups, None
    engine, _, loader, schedule = build(
        None,
        model,
        optimizer,
        model_parameters,
        training_data,
        lr_scheduler,
        distributed_port,
        mpu,
        dist_init_required,
        collate_fn,
        done.config,
        mesh_param,
        overlays=getattr(args, "overlays", None) or (),
        engine_type=DeepSpeedEngine,
    )
    ours = cast("DeepSpeedEngine", engine)
    _complete(ours, given)
    return ours, cast("DeepSpeedOptimizer | None", ours.optimizer), loader, schedule


def _tell(given: Mapping[str, Any], done: Translation) -> None:
    """Log what became of a config, at the level that it asks for."""
    if level := get_log_level(given):
        set_log_level_from_string(level)
    if Ranks.current().rank == 0:
        for line in done.notes:
            logger.info("config: %s", line)
        for line in done.ignored:
            logger.warning("config: %s", line)


def _refuse_unconnected(ranks: int) -> None:
    if ranks > 1 and not dist.is_initialized():
        raise ConfigError(
            "deepspeed.initialize: dist_init_required is False, and nothing has connected the "
            f"{ranks} ranks: call deepspeed.init_distributed() first, or leave it out"
        )


def _complete(engine: DeepSpeedEngine, config: Mapping[str, Any]) -> None:
    """Give an engine what only DeepSpeed's has."""
    engine.config = config
    if isinstance(engine.optimizer, DeepSpeedOptimizer):
        engine.optimizer.belong_to(engine)
    if config.get("compute_grad_norm", True):
        engine.get_global_grad_norm()  # asked for once, it is there after the first step, too
    show_attributes()


def add_config_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add ``--deepspeed`` and ``--deepspeed_config``, see ``drivetrain.add_config_arguments``."""
    return add_arguments(parser)


def _one_config(
    args: Any | None, config: ConfigSource | None, config_params: ConfigSource | None
) -> ConfigSource:
    """The one config among the places where scripts give it.

    Raises:
        ConfigError: there is none, or more than one.
    """
    given = {
        "config": config,
        "config_params": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
        "args.deepscale_config": getattr(args, "deepscale_config", None),
    }
    sources = {name: source for name, source in given.items() if source is not None}
    if len(sources) == 1:
        return next(iter(sources.values()))
    if not sources:
        raise ConfigError(
            "deepspeed.initialize needs a config: config=, a dict or the path of a JSON file, or "
            "--deepspeed_config in args"
        )
    raise ConfigError(f"the config is given more than once: {' and '.join(sources)}; give one")
