"""``DeepSpeedTransformerConfig``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from drivetrain.errors import ConfigError
from drivetrain.wording import did_you_mean


@dataclass
class DeepSpeedTransformerConfig:
    """Sizes and switches of a layer; -1 stands for what has to be given.

    Args:
        batch_size: accepted, has no effect: every batch may have its own size.
        hidden_size: width of the layer's input and output.
        intermediate_size: width between the two last products; four times ``hidden_size`` if not
            given.
        heads: of the attention; a divisor of ``hidden_size``.
        attn_dropout_ratio: part of the attention's weights that is dropped in training.
        hidden_dropout_ratio: part of what is added to a residual that is dropped in training.
        num_hidden_layers: of the model, for ``adjust_init_range``.
        initializer_range: standard deviation of new weights.
        layer_norm_eps: added to variances.
        local_rank: accepted, has no effect: the layer is made where torch makes tensors.
        seed: accepted, has no effect: dropout draws from torch's generator.
        fp16: accepted, has no effect: the layer computes in the dtype of its weights.
        pre_layer_norm: normalise what goes into attention and feed-forward (as in GPT), rather than
            the sums behind them (as in BERT).
        normalize_invertible: keep outputs of normalisations for backward, which are kept anyway for
            the product that follows, rather than their inputs. Weights must not be 0.
        gelu_checkpoint: compute GELU again in backward.
        adjust_init_range: divide ``initializer_range`` by the root of twice ``num_hidden_layers``
            for weights whose products are added to a residual.
        attn_dropout_checkpoint: compute attention again in backward.
        stochastic_mode: accepted, has no effect: no faster order of sums is known here.
        return_tuple: return ``(output,)``, as layers of Transformers do.
        training: dropout is on as long as the layer is in training mode, too.
    """

    batch_size: int = -1
    hidden_size: int = -1
    intermediate_size: int = -1
    heads: int = -1
    attn_dropout_ratio: float = -1
    hidden_dropout_ratio: float = -1
    num_hidden_layers: int = -1
    initializer_range: float = -1
    layer_norm_eps: float = 1e-12
    local_rank: int = -1
    seed: int = -1
    fp16: bool = False
    pre_layer_norm: bool = True
    normalize_invertible: bool = False
    gelu_checkpoint: bool = False
    adjust_init_range: bool = True
    attn_dropout_checkpoint: bool = False
    stochastic_mode: bool = False
    return_tuple: bool = False
    training: bool = True

    @classmethod
    def from_dict(cls, json_object: Mapping[str, Any]) -> DeepSpeedTransformerConfig:
        """Read a config from a dict.

        Raises:
            ConfigError: a key is not one of the arguments.
        """
        known = [field.name for field in fields(cls)]
        for name in json_object:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ConfigError(f"DeepSpeedTransformerConfig has no {name!r}{hint}")
        return cls(**json_object)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> DeepSpeedTransformerConfig:
        """Read a config from a JSON file; see :meth:`from_dict`."""
        return cls.from_dict(json.loads(Path(json_file).read_text("utf-8")))

    def check(self) -> None:
        """Refuse a config of which no layer can be made.

        Raises:
            ConfigError: it names the argument.
        """
        for name in ("hidden_size", "heads", "num_hidden_layers", "initializer_range"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"DeepSpeedTransformerConfig: {name} must be given and positive, got "
                    f"{getattr(self, name)}"
                )
        for name in ("attn_dropout_ratio", "hidden_dropout_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"DeepSpeedTransformerConfig: {name} must be given, at least 0 and less than "
                    f"1, got {getattr(self, name)}"
                )
        if self.hidden_size % self.heads:
            raise ConfigError(
                f"DeepSpeedTransformerConfig: hidden_size {self.hidden_size} must be a multiple of "
                f"heads {self.heads}"
            )
