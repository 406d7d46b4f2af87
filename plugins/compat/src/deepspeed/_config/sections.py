"""Sections of a config as objects of their own, as scripts make them: ``DeepSpeedZeroConfig``."""

from __future__ import annotations

from typing import Any, ClassVar

from deepspeed._config.translate import translate
from deepspeed._config.view import default_at, section_at
from drivetrain.plan.plan import Plan


class SectionView:
    """The keys of one section, checked; what is not given has its default.

    Args:
        keys: of the section.

    Raises:
        ConfigError: a key is unknown, or a value is not one that it may have.
    """

    path: ClassVar[str]

    def __init__(self, **keys: Any) -> None:
        plan = Plan.build(translate({"train_micro_batch_size_per_gpu": 1, self.path: keys}).config)
        self._section = section_at(plan, self.path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        for shown in (name, f"stage3_{name}"):
            if hasattr(self._section, shown):
                return getattr(self._section, shown)
        value = default_at(f"{self.path}.{name}")
        if value is None:
            raise AttributeError(f"the section {self.path} has no key {name!r}")
        return value


class DeepSpeedZeroConfig(SectionView):
    """The section ``zero_optimization``."""

    path = "zero_optimization"


class DeepSpeedFP16Config(SectionView):
    """The section ``fp16``."""

    path = "fp16"


class DeepSpeedBF16Config(SectionView):
    """The section ``bf16``."""

    path = "bf16"


def get_bfloat16_config(param_dict: dict[str, Any]) -> DeepSpeedBF16Config:
    """The section ``bf16`` of a config, also under its old name ``bfloat16``."""
    return DeepSpeedBF16Config(**param_dict.get("bf16", param_dict.get("bfloat16", {})))


def get_gradient_clipping(param_dict: dict[str, Any]) -> float:
    """The largest gradient norm that a config allows; 1 without the key, as in DeepSpeed."""
    value: float = param_dict.get("gradient_clipping", GRADIENT_CLIPPING_DEFAULT)
    return value


def dict_raise_error_on_duplicate_keys(ordered_pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object; ``object_pairs_hook`` of :func:`json.load`.

    Raises:
        ValueError: a key is there twice.
    """
    made = dict(ordered_pairs)
    if len(made) != len(ordered_pairs):
        keys = [key for key, _ in ordered_pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is in the config twice")
    return made


GRADIENT_CLIPPING_DEFAULT: float = default_at("gradient_clipping")

ADAM_OPTIMIZER = "adam"
ADAMW_OPTIMIZER = "adamw"
ADAGRAD_OPTIMIZER = "adagrad"
LAMB_OPTIMIZER = "lamb"
LION_OPTIMIZER = "lion"
ONEBIT_ADAM_OPTIMIZER = "onebitadam"
"""Values of ``optimizer.type``, in any case."""
