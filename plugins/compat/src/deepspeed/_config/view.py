"""``DeepSpeedConfig``: a config's values under the names that DeepSpeed's object gives them."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, RootModel

from deepspeed._config.files import ConfigSource, read_config
from deepspeed._config.keys import DEFAULTS
from deepspeed._config.translate import translate
from deepspeed._parts.errors import AsDeepSpeed
from drivetrain.contracts.loop.batch import solve_batch
from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan

if TYPE_CHECKING:
    from deepspeed._parts.monitor import DeepSpeedMonitorConfig

ATTRIBUTES: Mapping[str, str] = {
    "bfloat16_enabled": "bf16.enabled",
    "check_grad_overflow": "bf16.check_grad_overflow",
    "communication_data_type": "communication_data_type",
    "dataloader_drop_last": "dataloader_drop_last",
    "disable_allgather": "disable_allgather",
    "dump_state": "dump_state",
    "eigenvalue_enabled": "eigenvalue.enabled",
    "eigenvalue_gas_boundary_resolution": "eigenvalue.gas_boundary_resolution",
    "eigenvalue_layer_name": "eigenvalue.layer_name",
    "eigenvalue_layer_num": "eigenvalue.layer_num",
    "eigenvalue_max_iter": "eigenvalue.max_iter",
    "eigenvalue_stability": "eigenvalue.stability",
    "eigenvalue_tol": "eigenvalue.tol",
    "eigenvalue_verbose": "eigenvalue.verbose",
    "fp16_auto_cast": "fp16.auto_cast",
    "fp16_enabled": "fp16.enabled",
    "grad_accum_dtype": "data_types.grad_accum_dtype",
    "gradient_allreduce_op": "gradient_allreduce_op",
    "gradient_clipping": "gradient_clipping",
    "gradient_predivide_factor": "gradient_predivide_factor",
    "initial_dynamic_scale": "fp16.initial_scale_power",
    "load_universal_checkpoint": "checkpoint.load_universal",
    "loss_scale": "fp16.loss_scale",
    "memory_breakdown": "memory_breakdown",
    "optimizer_legacy_fusion": "optimizer.legacy_fusion",
    "optimizer_name": "optimizer.type",
    "optimizer_params": "optimizer.params",
    "pld_enabled": "progressive_layer_drop.enabled",
    "pld_params": "progressive_layer_drop",
    "prescale_gradients": "prescale_gradients",
    "scheduler_name": "scheduler.type",
    "scheduler_params": "scheduler.params",
    "sparse_gradients_enabled": "sparse_gradients",
    "steps_per_print": "steps_per_print",
    "torch_autocast_dtype": "torch_autocast.dtype",
    "torch_autocast_enabled": "torch_autocast.enabled",
    "wall_clock_breakdown": "wall_clock_breakdown",
    "zero_allow_untested_optimizer": "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer": "zero_force_ds_cpu_optimizer",
    "zero_optimization_stage": "zero_optimization.stage",
}
"""Attribute of DeepSpeed's object -> config path."""


class DeepSpeedConfig:
    """A checked config, for reading; an engine that is built already follows no change of it.

    Attributes:
        train_batch_size: samples of one step over all data shards.
        train_micro_batch_size_per_gpu: samples of one forward on one data shard.
        gradient_accumulation_steps: micro-batches between two updates.

    Args:
        config: a dict, a path or base64-url JSON, as ``initialize`` takes it.
        mpu: accepted; the number of data shards is the plan's.
        mesh_device: accepted, likewise.
        plan: made of the config already, by an engine.

    Raises:
        ConfigError: with every problem of the config at once.
    """

    train_batch_size: int | None
    train_micro_batch_size_per_gpu: int | None
    gradient_accumulation_steps: int | None

    @AsDeepSpeed()
    def __init__(
        self,
        config: ConfigSource,
        mpu: Any | None = None,
        mesh_device: Any | None = None,
        *,
        plan: Plan | None = None,
    ) -> None:
        self._param_dict = read_config(config)
        self._plan = plan or Plan.build(translate(self._param_dict).config)
        batch = self._plan.batch
        self.train_batch_size = batch.train_batch_size if batch else None
        self.train_micro_batch_size_per_gpu = batch.micro_batch_size if batch else None
        self.gradient_accumulation_steps = batch.accumulation_steps if batch else None

    def __getattr__(self, name: str) -> Any:
        if name in ATTRIBUTES:
            return value_at(self._plan, ATTRIBUTES[name])
        if f"{name.removesuffix('_config')}" in _SECTIONS and name.endswith("_config"):
            return section_at(self._plan, _SECTIONS[name.removesuffix("_config")])
        raise AttributeError(
            f"the config has no attribute {name!r} here; engine.config is it as a dict, and "
            "engine.job.plan what it means"
        )

    @AsDeepSpeed()
    def _configure_train_batch_size(self) -> None:
        """Complete the three sizes of batches after a script has set some of them.

        Raises:
            ConfigError: they do not multiply, are too few, or no positive whole numbers.
        """
        sizes = (
            self.train_batch_size,
            self.train_micro_batch_size_per_gpu,
            self.gradient_accumulation_steps,
        )
        for size in sizes:
            if size is not None and (type(size) is not int or size < 1):
                raise ConfigError(f"sizes of batches are whole numbers from 1 on, not {size!r}")
        batch = solve_batch(*sizes, self.world_size, self._plan.shards_origin())
        self.train_batch_size = batch.train_batch_size
        self.train_micro_batch_size_per_gpu = batch.micro_batch_size
        self.gradient_accumulation_steps = batch.accumulation_steps

    @property
    def monitor_config(self) -> DeepSpeedMonitorConfig:
        """The sections of monitors."""
        from deepspeed._parts.monitor import get_monitor_config

        return get_monitor_config(self._param_dict)

    @property
    def zero_enabled(self) -> bool:
        """Whether the stage is above 0."""
        return int(self.zero_optimization_stage) > 0

    @property
    def world_size(self) -> int:
        """Number of data shards, as DeepSpeed means it here."""
        return self._plan.layout.size("dp")

    def print(self, name: str = "DeepSpeedConfig") -> None:
        """Log every setting and where it comes from."""
        from deepspeed._parts.logs import logger

        for path, (value, source) in self._plan.explain().settings.items():
            logger.info("%s: %s = %r (%s)", name, path, value, source)


_SECTIONS: Mapping[str, str] = {
    "activation_checkpointing": "activation_checkpointing",
    "aio": "aio",
    "bfloat16": "bf16",
    "checkpoint": "checkpoint",
    "float16": "fp16",
    "fp16": "fp16",
    "timers": "timers",
    "zero": "zero_optimization",
}
"""Attribute ``<name>_config`` -> the section that it shows."""


def value_at(plan: Plan, path: str) -> Any:
    """A setting as its plugin reads it; DeepSpeed's default where no plugin has it.

    Args:
        plan: of the job.
        path: of the config.
    """
    keys = path.split(".")
    for end in range(len(keys), 0, -1):
        section = _model(plan, ".".join(keys[:end]))
        if section is not None:
            return _inside(section, keys[end:], path)
    return default_at(path)


def section_at(plan: Plan, path: str) -> Any:
    """A section as its plugin reads it, else DeepSpeed's defaults as attributes."""
    section = _model(plan, path)
    return SimpleNamespace(**default_at(path)) if section is None else section


def default_at(path: str) -> Any:
    """DeepSpeed's default of a key; ``None`` if it has none."""
    value: Any = DEFAULTS
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _model(plan: Plan, path: str) -> BaseModel | None:
    for member in plan.members:
        if path in member.plugin.sections:
            return member.plugin.section(member.plugin.sections[path])
    return None


def _inside(section: BaseModel, keys: list[str], path: str) -> Any:
    value: Any = section.root if isinstance(section, RootModel) else section
    for key in keys:
        if isinstance(value, Mapping):
            value = value.get(key)
        elif hasattr(value, key):
            value = getattr(value, key)
        else:
            return default_at(path)
    return value
