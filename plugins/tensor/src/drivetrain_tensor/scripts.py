"""What scripts call before they make an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_tensor.section import PATH, as_section

if TYPE_CHECKING:
    from drivetrain_tensor.section import TensorParallelSection

_MARK = "drivetrain_tensor_settings"


def tp_model_init(
    model: nn.Module,
    tp_size: int,
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Note that ``model`` is to be cut for ``tp_size`` ranks, which ``initialize`` then does.

    The config given to ``initialize`` needs a section ``tensor_parallel`` for as many ranks; until
    then the model's forward is refused, since it would silently be that of the whole model.

    Args:
        model: returned, with parameters of ``dtype``.
        tp_size: ranks that share each layer.
        dtype: of all floating-point parameters; ``None`` leaves them.
        config: keys of the section, to compare with that of ``initialize``.

    Raises:
        ConfigError: ``config`` says another number of ranks, or has unknown keys.
    """
    section = as_section(config if config else {"autotp_size": tp_size})
    if section.ranks not in (1, tp_size):
        raise ConfigError(
            f"tp_model_init: tp_size is {tp_size}, and config says {section.ranks} ranks: give one"
        )
    if dtype is not None:
        model.to(dtype)
    if tp_size > 1:
        setattr(model, _MARK, tp_size)
        model._drivetrain_tensor_guard = model.register_forward_pre_hook(_refuse)  # type: ignore[assignment]
    return model


def claim(model: nn.Module, section: TensorParallelSection) -> None:
    """Take over a model that ``tp_model_init`` has seen.

    Raises:
        ConfigError: it was told another number of ranks.
    """
    wanted = model.__dict__.pop(_MARK, None)
    if wanted is None:
        return
    model.__dict__.pop("_drivetrain_tensor_guard").remove()
    if wanted != section.ranks:
        raise ConfigError(
            f"{PATH}.autotp_size: tp_model_init was called with tp_size {wanted}, and the config "
            f"says {section.ranks}"
        )


def _refuse(module: nn.Module, args: Any) -> None:
    raise ConfigError(
        f"tp_model_init was called for this model with {getattr(module, _MARK)} ranks, and it has "
        f"not been cut: give initialize a config with a section {PATH}"
    )
