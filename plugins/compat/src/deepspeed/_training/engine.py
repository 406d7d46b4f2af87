"""``DeepSpeedEngine``: Drivetrain's engine under the names that scripts and frameworks read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from deepspeed._config.sections import get_log_level
from deepspeed._config.view import DeepSpeedConfig, section_at, value_at
from deepspeed._parts.errors import AsDeepSpeed
from deepspeed._parts.monitor import EngineMonitor
from deepspeed._parts.timers import ThroughputTimer
from deepspeed._training import checkpoints
from deepspeed._training.optimizer import DeepSpeedOptimizer
from deepspeed._training.settings import CALLS, SETTINGS
from drivetrain.contracts import Axis
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    import torch.distributed as dist

    from drivetrain.optimization.facade import EngineOptimizer


class DeepSpeedEngine(Engine):
    """What ``deepspeed.initialize`` returns; see :class:`drivetrain.Engine`.

    Whatever trains is the base class's. Here are other names, and values of the config as methods
    without arguments (``deepspeed._training.settings`` lists these).

    Attributes:
        config: the config as it was given, as a dict.
    """

    optimizer_type: ClassVar[type[EngineOptimizer]] = DeepSpeedOptimizer
    config: Mapping[str, Any]

    # -- ranks ----------------------------------------------------------------------------------

    @property
    def global_rank(self) -> int:
        """This process, of all."""
        return self.job.rank

    @property
    def local_rank(self) -> int:
        """This process, of those on its host."""
        return self.job.ranks.local_rank

    @property
    def world_size(self) -> int:
        """Number of data shards, as DeepSpeed means it here."""
        return self.job.mesh.size("dp")

    dp_world_size = world_size

    @property
    def mp_world_size(self) -> int:
        """Number of tensor-parallel ranks."""
        return self.job.mesh.size("tp")

    @property
    def data_parallel_group(self) -> dist.ProcessGroup | None:
        """Process group of the data shards."""
        return self._group("dp")

    @property
    def seq_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Process group over which gradients are summed."""
        return self._group("data")

    @property
    def seq_parallel_group(self) -> dist.ProcessGroup | None:
        """Process group of the ranks that share a sequence."""
        return self._group("sp")

    def get_sequence_parallel_group(self) -> dist.ProcessGroup | None:
        """See :attr:`seq_parallel_group`."""
        return self._group("sp")

    def get_data_parallel_rank(self) -> int:
        """This process, of the data shards."""
        return self.job.mesh.coordinate("dp")

    def get_tensor_parallel_rank(self) -> int:
        """This process, of the tensor-parallel ranks."""
        return self.job.mesh.coordinate("tp")

    get_model_parallel_rank = get_tensor_parallel_rank

    # -- settings -------------------------------------------------------------------------------

    @property
    def _config(self) -> DeepSpeedConfig:
        return DeepSpeedConfig(self.config, plan=self.job.plan)

    def get_batch_info(self) -> tuple[int, int, int]:
        """Global batch, micro-batch, and accumulation steps."""
        batch = self.batch
        return batch.train_batch_size, batch.micro_batch_size, batch.accumulation_steps

    def zero_optimization(self) -> bool:
        """Whether model states are sharded."""
        return self.zero_optimization_stage() > 0

    def zero_optimization_stage(self) -> int:
        """The stage of ZeRO; 0 for none."""
        return int(value_at(self.job.plan, "zero_optimization.stage"))

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether gradients are sharded."""
        return self.zero_optimization_stage() >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Whether parameters are sharded."""
        return self.zero_optimization_stage() >= 3

    def zero_offload_optimizer(self) -> Any:
        """The section of that name, or ``None`` if nothing is offloaded."""
        return self._offload("offload_optimizer")

    def zero_offload_param(self) -> Any:
        """The section of that name, or ``None`` if nothing is offloaded."""
        return self._offload("offload_param")

    def zero_cpu_offload(self) -> bool:
        """Whether optimizer states live in host memory."""
        section = self.zero_offload_optimizer()
        return section is not None and section.device == "cpu"

    zero_use_cpu_optimizer = zero_cpu_offload

    def zero_has_nvme_offload(self) -> bool:
        """Whether anything lives in files."""
        both = (self.zero_offload_optimizer(), self.zero_offload_param())
        return any(section is not None and section.device == "nvme" for section in both)

    def optimizer_name(self) -> str | None:
        """``optimizer.type`` as the config gives it, or the class of the script's optimizer."""
        return self.get_type()

    def scheduler_name(self) -> str | None:
        """``scheduler.type`` as the config gives it."""
        name: str | None = value_at(self.job.plan, "scheduler.type")
        return name

    def log_level(self) -> str | None:
        """The level of DeepSpeed's logger, as the config gives it."""
        return get_log_level(self.config)

    def loss_scale(self) -> float:
        """What losses are multiplied by now."""
        return self.loss_scaler.scale_value

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale follows overflows."""
        return self.loss_scaler.dynamic

    def postscale_gradients(self) -> bool:
        """Whether gradients are divided after they are summed."""
        return not value_at(self.job.plan, "prescale_gradients")

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of parameters and of accumulated gradients."""
        names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        model = next((p.dtype for p in self.module.parameters()), torch.float32)
        named = value_at(self.job.plan, "data_types.grad_accum_dtype")
        return model, names.get(named, model)

    @property
    def communication_data_type(self) -> torch.dtype | None:
        """The dtype in which gradients travel; ``None`` for that of the parameters."""
        names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        return names.get(value_at(self.job.plan, "communication_data_type"))

    @property
    def basic_optimizer(self) -> EngineOptimizer | None:
        """The optimizer."""
        return self.optimizer

    @property
    def sparse_tensor_module_names(self) -> set[str]:
        """Tables whose gradients travel as rows, by the config's ``sparse_gradients``."""
        if not value_at(self.job.plan, "sparse_gradients"):
            return set()
        kinds = (nn.Embedding, nn.EmbeddingBag)
        parts = self.module.named_modules()
        return {f"{name}.weight".lstrip(".") for name, part in parts if isinstance(part, kinds)}

    @property
    def monitor(self) -> EngineMonitor:
        """Where a script shows numbers of its own."""
        return EngineMonitor(self)

    @property
    def tput_timer(self) -> ThroughputTimer:
        """Samples per second of this engine's steps, measured from the first use of it on."""
        if self._throughput is None:
            enabled = value_at(self.job.plan, "timers.throughput.enabled")
            section = SimpleNamespace(enabled=enabled)
            self._throughput = ThroughputTimer(section, self.batch.train_batch_size)
        return self._throughput

    _throughput: ThroughputTimer | None = None

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`compile` was called."""
        return self._is_compiled

    _is_compiled = False

    # -- calls ----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`drivetrain.Engine.forward`."""
        if self._throughput is not None and self.training:
            self._throughput.start()
        return super().forward(*args, **kwargs)

    def step(self, lr_kwargs: dict[str, Any] | None = None, *, micro_batches: int = 1) -> None:
        """See :meth:`drivetrain.Engine.step`."""
        before = self.global_steps
        super().step(lr_kwargs, micro_batches=micro_batches)
        if self._throughput is not None:
            self._throughput.stop(global_step=self.global_steps > before)

    def compile(
        self,
        backend: str | Callable[..., Any] = "inductor",
        compile_kwargs: Mapping[str, Any] | None = None,
        schedule: Any | None = None,
        compiled_autograd_enabled: bool = False,
        **kwargs: Any,
    ) -> None:
        """Compile the repeated blocks of the module, or the module if it has none.

        Args:
            backend: of ``torch.compile``.
            compile_kwargs: further arguments of ``torch.compile``.
            schedule: of DeepCompile's passes; must be ``None``.
            compiled_autograd_enabled: must be false.
            kwargs: as ``compile_kwargs``.

        Raises:
            ConfigError: passes or compiled autograd are asked for.
        """
        if schedule is not None or compiled_autograd_enabled:
            raise ConfigError(
                "engine.compile: schedule and compiled_autograd_enabled need drivetrain-compile, "
                "which is not released yet"
            )
        super().compile(backend, **{**(compile_kwargs or {}), **kwargs})  # type: ignore[arg-type]
        self._is_compiled = True

    def eval_batch(
        self,
        data_iter: Iterator[Any],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Evaluate micro-batches: of a pipeline, as many as a step has. Collective.

        Args:
            data_iter: yields micro-batches of this data shard.
            return_logits: return outputs, too, on the stage that has them.
            compute_loss: else outputs are reduced in place of losses.
            reduce_output: ``"avg"``, or ``None`` for one value per micro-batch.
            bcast_loss: all stages get the loss.
            num_micro_batches: how many.

        Raises:
            ConfigError: other arguments than ``data_iter`` for an engine without a pipeline.
        """
        options = (return_logits, compute_loss, reduce_output, bcast_loss, num_micro_batches)
        if hasattr(self.runner, "evaluate"):
            return self.eval_micro_batches(data_iter, *options)
        if options != (False, True, "avg", True, None):
            raise ConfigError(
                "eval_batch: this engine has no pipeline, so it takes data_iter alone and "
                "evaluates one micro-batch; call engine(batch) for its outputs"
            )
        return super().eval_batch(data_iter)

    def _backward_prologue(self) -> None:
        """Before a backward that the script runs itself; it is noticed in any case.

        Raises:
            TrainingError: the engine has no optimizer.
        """
        self._require_optimizer("run backward")
        self._window.settle()

    def _backward_epilogue(self) -> None:
        """After a backward that the script ran itself, such as one of several engines' losses.

        The engine notices by itself where such a pass begins and ends, at whatever outputs of its
        own the pass crosses; one that died of an exception is ended here.

        Raises:
            TrainingError: the engine has no optimizer.
        """
        self._backward_prologue()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """See :meth:`drivetrain.engine.accumulation.Accumulating.no_sync`."""
        with AsDeepSpeed(), super().no_sync():
            yield

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group."""
        for group in () if self.optimizer is None else self.optimizer.param_groups:
            group["lr"] = lr

    def get_mom(self) -> list[Any]:
        """Momentum of SGD-like optimizers, betas of others, for every group."""
        return super().get_mom()

    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """Accepted, has no effect: ``step`` reduces gradients."""

    def empty_partition_cache(self) -> None:
        """Accepted, has no effect: units are released after each update."""

    def save_checkpoint(  # type: ignore[override]
        self,
        save_dir: str | os.PathLike[str],
        tag: str | int | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save all that training needs to go on. Collective: see ``drivetrain.checkpoint.save``.

        Returns:
            True.
        """
        return checkpoints.save(
            self, save_dir, tag, client_state, save_latest, exclude_frozen_parameters
        )

    def load_checkpoint(  # type: ignore[override]
        self,
        load_dir: str | os.PathLike[str],
        tag: str | int | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Restore a checkpoint of ours or of DeepSpeed, in any layout. Collective.

        See :func:`drivetrain.checkpoint.load`.

        Raises:
            ConfigError: ``custom_load_fn`` is given.
        """
        if custom_load_fn is not None:
            raise ConfigError(
                "load_checkpoint: custom_load_fn is not supported; change the weights inside "
                "`with deepspeed.zero.GatheredParameters(...)` after loading"
            )
        return checkpoints.load(
            self,
            load_dir,
            tag,
            load_module_strict=load_module_strict,
            load_optimizer_states=load_optimizer_states,
            load_lr_scheduler_states=load_lr_scheduler_states,
            load_module_only=load_module_only,
        )

    def _get_optimizer_ckpt_name(
        self, checkpoints_path: str | os.PathLike[str], tag: str | int, expp_rank: int
    ) -> str:
        """Where optimizer states of experts lie: the folder of the checkpoint, as all states do."""
        return os.path.join(checkpoints_path, str(tag))  # noqa: PTH118 - as the caller spells it

    def load_module_state_dict(
        self,
        state_dict: dict[str, Any] | None = None,
        strict: bool = True,
        custom_load_fn: Callable[..., Any] | None = None,
        fetch_z3_params: bool = False,
        *,
        checkpoint: dict[str, Any] | None = None,
    ) -> None:
        """Load the module's ``state_dict``, the same on every rank; masters follow.

        Args:
            state_dict: itself, or a dict that has it under ``"module"``.
            strict: names must be the module's.
            custom_load_fn: must be ``None``.
            fetch_z3_params: accepted; sharded parameters are always gathered.
            checkpoint: DeepSpeed's name of ``state_dict``.

        Raises:
            ConfigError: ``custom_load_fn`` is given, or no state.
        """
        given = state_dict if state_dict is not None else checkpoint
        if given is None or custom_load_fn is not None:
            raise ConfigError("load_module_state_dict needs a state_dict, and no custom_load_fn")
        inner = given.get("module")
        super().load_module_state_dict(inner if isinstance(inner, dict) else given, strict)

    def module_state_dict(
        self, *args: Any, exclude_frozen_parameters: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """``state_dict`` of the whole model, whichever rank has what.

        Collective: every rank calls it, also if the first alone wants the result.

        Args:
            args: ``destination``, ``prefix`` and ``keep_vars`` of torch's ``state_dict``.
            exclude_frozen_parameters: leave out parameters that are not trained.
            kwargs: as ``args``.
        """
        names = ("destination", "prefix", "keep_vars")
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        state = super().module_state_dict(**options)
        if exclude_frozen_parameters:
            state = checkpoints.without_frozen(self, state, options.get("prefix", ""))
        return state

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the weights that the module computes with to one file. Collective.

        Args:
            save_dir: made if need be.
            save_filename: ``*.safetensors`` for such a file, anything else for ``torch.save``.
            exclude_frozen_parameters: leave out parameters that are not trained.

        Returns:
            True; False at stage 3 if the config does not allow to gather there.
        """
        return checkpoints.save_weights(self, save_dir, save_filename, exclude_frozen_parameters)

    save_fp16_model = save_16bit_model

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, Any] | None:
        """Whole weights on the host of the first rank; ``None`` elsewhere. Collective."""
        return checkpoints.consolidated(self, exclude_frozen_parameters)

    _consolidated_16bit_state_dict = _zero3_consolidated_16bit_state_dict

    # -- internals ------------------------------------------------------------------------------

    def _group(self, axis: Axis) -> dist.ProcessGroup | None:
        from deepspeed._parts.groups import group_of

        return group_of(self.job, axis)

    def _offload(self, name: str) -> Any:
        section = section_at(self.job.plan, f"zero_optimization.{name}")
        return None if section.device == "none" else section


def _setting(name: str, path: str) -> Callable[[DeepSpeedEngine], Any]:
    def read(engine: DeepSpeedEngine) -> Any:
        return value_at(engine.job.plan, path)

    read.__name__ = read.__qualname__ = name
    read.__doc__ = f"The config's ``{path}``."
    return read


for _name, _path in SETTINGS.items():
    setattr(DeepSpeedEngine, _name, _setting(_name, _path))

for _name in CALLS:
    setattr(DeepSpeedEngine, _name, AsDeepSpeed()(getattr(DeepSpeedEngine, _name)))
