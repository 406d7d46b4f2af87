"""``deepspeed.compression``: what scripts call before and after they train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_compression.stored.serving import store_for_serving
from drivetrain_compression.training import api
from drivetrain_compression.training.session import session_of

Config = api.Config


def init_compression(
    model: Any, deepspeed_config: Config, teacher_model: Any = None, mpu: Any = None
) -> Any:
    """See :func:`drivetrain_compression.init_compression`.

    Args:
        model: the model, or an engine's, which is returned as it was given.
        deepspeed_config: a config, or the path of one.
        teacher_model: needed by ``layer_reduction`` and ``distillation``; a module or an engine.
            An engine runs as such, so its layers may be sharded.
        mpu: must be ``None``.
    """
    _refuse_mpu(mpu)
    api.init_compression(_module(model), deepspeed_config, _teacher(teacher_model))
    return model


def redundancy_clean(model: Any, deepspeed_config: Config, mpu: Any = None) -> Any:
    """See :func:`drivetrain_compression.redundancy_clean`."""
    _refuse_mpu(mpu)
    api.redundancy_clean(_module(model), deepspeed_config)
    return model


def student_initialization(student_model: Any, teacher_model: Any, deepspeed_config: Config) -> Any:
    """See :func:`drivetrain_compression.student_initialization`."""
    return api.student_initialization(
        _module(student_model), _module(teacher_model), deepspeed_config
    )


def quantise_for_serving(model: Any, ds_config: Config) -> Any:
    """See :func:`drivetrain_compression.store_for_serving`.

    Args:
        model: the model, or an engine's, which is returned as it was given.
        ds_config: a config with ``weight_quantization``, or the path of one.
    """
    store_for_serving(_module(model), ds_config)
    return model


class compression_scheduler:  # noqa: N801 - its name in DeepSpeed
    """Tells a compressed model of steps, where a script trains it without an engine.

    Args:
        model: from :func:`init_compression`.
        compression_config: not needed; the model knows.

    Raises:
        ConfigError: the model is not compressed.
    """

    def __init__(self, model: Any, compression_config: Any = None) -> None:
        session = session_of(_module(model))
        if session is None:
            raise ConfigError("the model is not compressed: call init_compression first")
        self._session = session
        self.training_steps = 0

    def step(self, step_zero_check: bool = False) -> None:
        """Count an optimizer step; with ``step_zero_check`` only begin what begins at once."""
        if not step_zero_check:
            self.training_steps += 1
        self._session.catch_up(self.training_steps)

    @property
    def weight_quantization_enabled(self) -> bool:
        """Whether weights of some module are quantised now."""
        from drivetrain_compression.training.weights import WeightQuantisation

        found = self._session.modifiers
        return any(m.started for m in found if isinstance(m, WeightQuantisation))


def convert_conv1d_to_linear(model: nn.Module, convert_type: type[nn.Module]) -> nn.Module:
    """Replace linear layers whose weight is [in, out], as GPT-2's, by ``nn.Linear``.

    Args:
        model: changed in place; parameters that are tied stay tied to what they were tied to only
            if they are vectors.
        convert_type: their class, with ``weight`` and ``bias``.

    Returns:
        The model.
    """
    root: Any = getattr(model, "module", model)
    for name, module in [(n, m) for n, m in root.named_modules() if isinstance(m, convert_type)]:
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        if weight is None or weight.dim() != 2:
            raise ConfigError(f"{name} ({type(module).__name__}) has no weight [in, out]")
        inputs, outputs = weight.shape
        linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(
            weight.detach().t().contiguous(), requires_grad=weight.requires_grad
        )
        if bias is not None:
            linear.bias = bias
        linear.train(module.training)
        parent, _, own = name.rpartition(".")
        setattr(root.get_submodule(parent), own, linear)
    return model


def fake_quantise(
    input: torch.Tensor,
    groups: int = 1,
    bit_num: int = 8,
    sr: bool = False,
    asym: bool = False,
) -> torch.Tensor:
    """Quantise in place, in equal groups in memory order; returns ``input``.

    Args:
        input: any shape, contiguous.
        groups: scales.
        bit_num: 3 to 16.
        sr: round by chance.
        asym: a grid that is not around 0.

    Raises:
        ConfigError: bits are out of range, or groups do not divide.
    """
    from drivetrain_compression.quantisers.grouping import in_groups
    from drivetrain_compression.quantisers.integer import asymmetric, check_bits, symmetric

    check_bits(bit_num, "ds_quantizer", least=3)
    with torch.no_grad():
        exact = input if input.dtype == torch.float64 else input.float()
        rows = in_groups(exact, groups, "ds_quantizer")
        noise = (lambda like: torch.rand_like(like) - 0.5) if sr else None
        changed = (asymmetric if asym else symmetric)(rows, bit_num, noise)
        return input.copy_(changed.view(input.shape))


def _module(model: Any) -> nn.Module:
    found: nn.Module = model.module if hasattr(model, "module") else model
    return found


def _teacher(model: Any) -> Any:
    """An engine as it is, as only engines gather the parameters of a sharded module."""
    from drivetrain import Engine

    return model if model is None or isinstance(model, Engine) else _module(model)


def _refuse_mpu(mpu: Any) -> None:
    if mpu is not None:
        raise ConfigError(
            "mpu: layers that are cut over ranks cannot be compressed; compress the whole model"
        )
