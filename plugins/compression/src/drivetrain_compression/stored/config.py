"""How base weights are stored, and what is trained beside them: DeepSpeed's configs for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from drivetrain.contracts import WeightFormat
from drivetrain.errors import ConfigError
from drivetrain_compression.stored.formats import format_named

_FLOATS = {(8, 3): "e4m3", (8, 2): "e5m2"}
_GROUP = 512


@dataclass
class QuantizationConfig:
    """How a weight is stored.

    Args:
        q_bits: 8, 6 or 4: small floating-point numbers with a scale a group.
        mantissa_bits: 3 (E4M3) or 2 (E5M2) of 8 bits; 6 bits have 2 (E3M2), 4 have 1 (E2M1).
        group_size: numbers in memory order that share a scale, a multiple of 8; the last group may
            be short.
        q_dtype: of the bytes; ``torch.uint8``.
        format: the name of a weight format of any installed package, such as ``nf4`` or ``int4``,
            in place of bits; ``group_size`` is then the format's own unless it is set.

    Raises:
        ConfigError: there is no such format, when it is first asked for.
    """

    q_bits: int = 8
    mantissa_bits: int = 3
    group_size: int = _GROUP
    q_dtype: torch.dtype = torch.uint8
    format: str = ""

    def weight_format(self) -> WeightFormat:
        """A format as described.

        Raises:
            ConfigError: there is none.
        """
        if self.q_dtype != torch.uint8:
            raise ConfigError(f"q_dtype: {self.q_dtype}; weights are stored as torch.uint8")
        if self.format:
            own: dict[str, Any] = {} if self.group_size == _GROUP else {"group": self.group_size}
            return format_named(self.format, **own)
        name = {6: "e3m2", 4: "e2m1"}.get(self.q_bits)
        name = name or _FLOATS.get((self.q_bits, self.mantissa_bits))
        if name is None:
            raise ConfigError(
                f"q_bits, mantissa_bits: no format has {self.q_bits} bits, {self.mantissa_bits} "
                "of them mantissa; there are (8, 3), (8, 2), 6 and 4"
            )
        return format_named(name, group=self.group_size)


@dataclass
class LoRAConfig:
    """What is trained beside a frozen weight.

    Args:
        lora_r: rank.
        lora_alpha: the change is multiplied by ``lora_alpha / lora_r``.
        base_weight_sharding: 1, or the number of ranks, each of which keeps a part of the weight.
        offload: accepted, has no effect, as in DeepSpeed.
        offload_ratio: 0; frozen weights are not kept on the host.
        delay_lora_init: make the trained weights when ``init_lora`` is called.
        target_mods: last parts of the names of layers that get one, for who converts a model.

    Raises:
        ConfigError: a number is out of range.
    """

    lora_r: int = 64
    lora_alpha: float = 16.0
    base_weight_sharding: int = 1
    offload: bool = False
    offload_ratio: float = 0.0
    delay_lora_init: bool = False
    target_mods: Sequence[str] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.offload_ratio:
            raise ConfigError(
                f"offload_ratio: {self.offload_ratio}; frozen weights are not kept on the host: "
                "divide them among ranks (base_weight_sharding) or store fewer bits"
            )
        if self.lora_r < 1 or self.base_weight_sharding < 1:
            raise ConfigError("lora_r and base_weight_sharding are at least 1")
