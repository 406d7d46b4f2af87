"""In which dtypes a job computes, accumulates, communicates and keeps its weights."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from drivetrain.errors import ConfigError
from drivetrain.precision.loss_scale import DynamicLossScaler, LossScaler
from drivetrain.sections.precision import (
    BF16,
    FP16,
    CommunicationDataType,
    DataTypes,
    TorchAutocast,
)
from drivetrain.tensor_parts import is_stored

if TYPE_CHECKING:
    from drivetrain.contracts.state.parameters import ParameterTable
    from drivetrain.plan.plan import Plan

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_SAFE_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules that autocast runs in the lower precision; their gradients carry no more than that."""


@dataclass(frozen=True)
class Precision:
    """The dtypes of one job.

    Args:
        parameter: dtype of parameters in forward and backward; ``None`` keeps the module's own.
        master: dtype of master weights of parameters in a lower precision.
        state: dtype of optimizer states; ``None`` for the masters'.
        gradient: dtype that gradients accumulate in; ``None`` for each parameter's own.
        wire: dtype that gradients travel in; ``None`` for each parameter's own.
        buffer: dtype of floating buffers; ``None`` for that of the parameters.
        inputs: dtype that floating inputs are cast to; ``None`` leaves them.
        lower: dtype of ``torch.autocast`` around forward; ``None`` for none.
        safe_modules: modules whose gradients travel in ``lower``.
        check_finite: skip updates whose gradients are not finite.
        lenient: train on from a loss that is not finite, as a plugin that goes back wants it.
    """

    parameter: torch.dtype | None = None
    master: torch.dtype = torch.float32
    state: torch.dtype | None = None
    gradient: torch.dtype | None = None
    wire: torch.dtype | None = None
    buffer: torch.dtype | None = None
    inputs: torch.dtype | None = None
    lower: torch.dtype | None = None
    safe_modules: tuple[type[nn.Module], ...] = ()
    check_finite: bool = False
    lenient: bool = False

    @classmethod
    def of(cls, plan: Plan) -> Precision:
        """The precision that a plan's config asks for.

        Low-precision gradients of several micro-batches are accumulated in float32 unless
        ``data_types.grad_accum_dtype`` says otherwise: in bfloat16 the eighth of equal terms would
        already be rounded away.
        """
        fp16, bf16 = plan.section(FP16), plan.section(BF16)
        types, autocast = plan.section(DataTypes), plan.section(TorchAutocast)
        accumulates = plan.batch is not None and plan.batch.accumulation_steps > 1
        parameter, master, state = None, torch.float32, None
        low_gradients = False
        if fp16.enabled:
            parameter, low_gradients = torch.float16, fp16.fp16_master_weights_and_grads
        elif bf16.enabled:
            parameter, low_gradients = torch.bfloat16, bf16.bf16_master_weights_and_grads
        if parameter is not None and low_gradients:
            master = parameter
            state = parameter if bf16.bf16_optimizer_states else torch.float32
        gradient = _dtype(types.grad_accum_dtype)
        if gradient is None and parameter is not None and accumulates and not low_gradients:
            gradient = torch.float32
        lower = DTYPES[autocast.dtype] if autocast.enabled else None
        return cls(
            parameter=parameter,
            master=master,
            state=state,
            gradient=gradient,
            wire=_dtype(plan.section(CommunicationDataType).root),
            buffer=_dtype(types.buffer_dtype),
            inputs=torch.float16 if fp16.enabled and fp16.auto_cast else None,
            lower=lower,
            safe_modules=_modules(autocast.lower_precision_safe_modules),
            check_finite=fp16.enabled
            or lower == torch.float16
            or (bf16.enabled and bf16.check_grad_overflow),
        )

    def describe(self, module: nn.Module, table: ParameterTable) -> None:
        """Fill in the dtypes of every floating parameter of ``module``.

        A frozen parameter that is only stored in its dtype keeps it: one in 8 bits, or a subclass
        that computes with what it wraps. So do those beside float32 statistics, which torch
        normalises with in one dtype.
        """
        exact = {id(p) for part in self._statistics(module) for p in part.parameters(recurse=False)}
        for parameter in module.parameters():
            stored = is_stored(parameter) and not parameter.requires_grad
            if not parameter.is_floating_point() or stored:
                continue
            info = table.info(parameter)
            if id(parameter) in exact:
                info.compute_dtype = torch.float32
            elif self.parameter is not None:
                info.compute_dtype = self.parameter
                info.master_dtype = self.master
                info.state_dtype = self.state
            info.reduce_dtype = self.wire or (
                info.compute_dtype if info.compute_dtype != self.gradient else None
            )
        if self.lower is not None and self.wire is None:
            for part in module.modules():
                if isinstance(part, self.safe_modules):
                    for parameter in part.parameters(recurse=False):
                        table.info(parameter).reduce_dtype = self.lower

    def cast_buffers(self, module: nn.Module, lent: Collection[nn.Module] = ()) -> None:
        """Give floating buffers the configured dtype, or else that of the parameters.

        Those of modules that another engine lends stay as they are.

        Running statistics stay in float32 unless the config says otherwise: in bfloat16 they would
        stop a few percent away from what they are to become.
        """
        wanted = self.buffer or self.parameter
        if wanted is None:
            return
        exact = {id(part) for part in self._statistics(module)}
        cast: dict[int, torch.Tensor] = {}  # modules may share a buffer
        for part in (part for part in module.modules() if part not in lent):
            for name, buffer in part.named_buffers(recurse=False):
                if not buffer.is_floating_point() or is_stored(buffer):
                    continue
                if id(buffer) not in cast:
                    dtype = torch.float32 if id(part) in exact else wanted
                    cast[id(buffer)] = buffer.to(dtype)
                setattr(part, name, cast[id(buffer)])

    def _statistics(self, module: nn.Module) -> list[nn.Module]:
        """Modules that keep running statistics in float32 beside parameters in less."""
        if self.parameter is None or self.buffer not in (None, torch.float32):
            return []
        normalising = [part for part in module.modules() if isinstance(part, _NormBase)]
        return [part for part in normalising if part.running_mean is not None]

    def cast_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cast floating tensors among the arguments of a forward."""
        dtype = self.inputs
        assert dtype is not None

        def cast(leaf: Any) -> Any:
            floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            return leaf.to(dtype) if floating and not is_stored(leaf) else leaf

        args, kwargs = pytree.tree_map(cast, (args, kwargs))
        return args, kwargs

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context that forward runs in."""
        if self.lower is None:
            return nullcontext()
        return torch.autocast(device.type, self.lower)


def loss_scaler(plan: Plan) -> LossScaler:
    """The loss scaler that a plan's precision needs."""
    fp16, autocast = plan.section(FP16), plan.section(TorchAutocast)
    if autocast.enabled and autocast.dtype == "fp16":
        return DynamicLossScaler()
    if not fp16.enabled:
        return LossScaler()
    if fp16.loss_scale > 0:
        return LossScaler(fp16.loss_scale)
    return DynamicLossScaler(
        2.0**fp16.initial_scale_power,
        window=fp16.loss_scale_window,
        min_scale=fp16.min_loss_scale,
        hysteresis=fp16.hysteresis,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
    )


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else DTYPES[name]


def _modules(paths: tuple[str, ...] | None) -> tuple[type[nn.Module], ...]:
    return _SAFE_MODULES if paths is None else tuple(map(_module_class, paths))


def _module_class(path: str) -> type[nn.Module]:
    from pkgutil import resolve_name

    where = "torch_autocast.lower_precision_safe_modules"
    try:
        found = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}: no class {path!r}: {error}") from error
    if isinstance(found, type) and issubclass(found, nn.Module):
        return found
    raise ConfigError(f"{where}: {path!r} is no torch.nn.Module class")
