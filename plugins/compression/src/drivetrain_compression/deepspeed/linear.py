"""``deepspeed.linear``: linear layers over quantised, frozen weights, with LoRA or without."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from drivetrain.contracts import WeightFormat
from drivetrain.errors import ConfigError
from drivetrain_compression.stored.config import LoRAConfig, QuantizationConfig
from drivetrain_compression.stored.formats import Plain
from drivetrain_compression.stored.linear import LoRALinear, StoredLinear
from drivetrain_compression.stored.weight import StoredWeight


class OptimizedLinear:
    """Makes a linear layer: plain, LoRA over a frozen weight, or over a quantised one.

    Args:
        input_dim: features in.
        output_dim: features out.
        bias: whether there is one; frozen beside LoRA.
        lora_config: makes it a :class:`LoRAOptimizedLinear`.
        quantization_config: without LoRA, makes it a :class:`QuantizedLinear`.
        device: of the weights.
        dtype: of the weights, before they are quantised.
        linear_cls: what draws the first weights, and the layer that is returned without configs.

    Raises:
        ConfigError: the configs describe what there is not.
    """

    def __new__(  # type: ignore[misc]
        cls,
        input_dim: int,
        output_dim: int,
        bias: bool = False,
        lora_config: LoRAConfig | None = None,
        quantization_config: QuantizationConfig | None = None,
        device: Any = None,
        dtype: torch.dtype = torch.bfloat16,
        linear_cls: type[nn.Linear] = nn.Linear,
    ) -> nn.Module:
        if lora_config is not None:
            return LoRAOptimizedLinear(
                input_dim, output_dim, bias, lora_config, quantization_config, device, dtype,
                linear_cls,
            )  # fmt: skip
        if quantization_config is not None:
            return QuantizedLinear(input_dim, output_dim, bias, quantization_config, device, dtype)
        return linear_cls(input_dim, output_dim, bias=bias, device=device, dtype=dtype)


class LoRAOptimizedLinear(LoRALinear):
    """LoRA over a frozen weight; see :class:`OptimizedLinear`."""

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        bias: bool = False,
        lora_config: LoRAConfig | None = None,
        quantization_config: QuantizationConfig | None = None,
        device: Any = None,
        dtype: torch.dtype = torch.bfloat16,
        linear_cls: type[nn.Linear] = nn.Linear,
    ) -> None:
        lora = lora_config or LoRAConfig()
        drawn = linear_cls(input_dim, output_dim, bias=bias, device=device, dtype=dtype)
        form: WeightFormat | None = None
        if quantization_config is not None:
            form = quantization_config.weight_format()
        elif lora.base_weight_sharding > 1:
            form = Plain(dtype)
        super().__init__(
            drawn.weight,
            drawn.bias,
            form,
            rank=lora.lora_r,
            alpha=lora.lora_alpha,
            shards=lora.base_weight_sharding,
            delayed=lora.delay_lora_init,
        )


class QuantizedLinear(StoredLinear):
    """A linear layer over a quantised, frozen weight; see :class:`OptimizedLinear`."""

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        bias: bool = False,
        quantization_config: QuantizationConfig | None = None,
        device: Any = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        drawn = nn.Linear(input_dim, output_dim, bias=bias, device=device, dtype=dtype)
        form = (quantization_config or QuantizationConfig()).weight_format()
        super().__init__(drawn.weight, drawn.bias, form)


class QuantizedParameter(StoredWeight):
    """A frozen, quantised matrix: a module, so that nothing takes it for a parameter to train.

    Args:
        data: [out, in], floating.
        requires_grad: must be false.
        quantization_config: by default E4M3 in groups of 512.

    Raises:
        ConfigError: it is to be trained, or cannot be quantised.
    """

    def __init__(
        self,
        data: torch.Tensor,
        requires_grad: bool = False,
        quantization_config: QuantizationConfig | None = None,
    ) -> None:
        if requires_grad:
            raise ConfigError("requires_grad: quantised weights are frozen; train LoRA beside them")
        super().__init__(data, (quantization_config or QuantizationConfig()).weight_format())


def init_lora(model: nn.Module) -> None:
    """Make the trained weights of all layers that have been told to wait (``delay_lora_init``)."""
    for part in model.modules():
        if isinstance(part, LoRALinear):
            part.init_lora()
