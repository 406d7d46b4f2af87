"""Sections of a config as objects of their own, as scripts make them: ``DeepSpeedZeroConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

from deepspeed._config.translate import translate
from deepspeed._config.view import default_at
from drivetrain.plan.registry import Registry


class SectionView:
    """The keys of one section, checked; what is not given has its default.

    Args:
        keys: of the section. Those without effect here are shown as they were given.

    Attributes:
        given: names of the keys.

    Raises:
        ValidationError: of pydantic, as in DeepSpeed: a key is unknown, or a value is not one that
            it may have.
    """

    path: ClassVar[str]

    def __init__(self, **keys: Any) -> None:
        read = _translated(self.path, keys)
        self._section = _checked(self.path, read)
        self._dropped = {k: v for k, v in keys.items() if k not in read and v is not None}
        self.given = frozenset(keys)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._dropped:
            return self._dropped[name]
        for shown in (name, f"stage3_{name}"):
            if hasattr(self._section, shown):
                return getattr(self._section, shown)
        value = default_at(f"{self.path}.{name}")
        if value is None:
            raise AttributeError(f"the section {self.path} has no key {name!r}")
        return value


def _translated(path: str, keys: dict[str, Any]) -> dict[str, Any]:
    """The keys of a section as Drivetrain reads them."""
    config: dict[str, Any] = {}
    inside, names = config, path.split(".")
    for name in names[:-1]:
        inside = inside.setdefault(name, {})
    inside[names[-1]] = keys
    found: Any = translate(config).config
    for name in names:
        found = found.get(name, {})
    section: dict[str, Any] = found
    return section


def _checked(path: str, keys: dict[str, Any]) -> Any:
    """A section as its plugin reads it, without those inside that other plugins own."""
    registry = Registry.installed()
    entry = registry.find("plugins", path)
    if entry is None:
        return SimpleNamespace(**{**default_at(path), **keys})
    own = [name for name in registry.names("plugins") if name.startswith(f"{path}.")]
    inner = {name.removeprefix(f"{path}.").split(".")[0] for name in own}
    model = entry.load().sections[path]
    return model.model_validate({k: v for k, v in keys.items() if k not in inner})


class DeepSpeedZeroOffloadParamConfig(SectionView):
    """The section ``zero_optimization.offload_param``."""

    path = "zero_optimization.offload_param"


class DeepSpeedZeroOffloadOptimizerConfig(SectionView):
    """The section ``zero_optimization.offload_optimizer``."""

    path = "zero_optimization.offload_optimizer"

    @property
    def pipeline(self) -> bool:
        """Whether states are read or written while others are updated."""
        keys = self.given & {"pipeline_read", "pipeline_write"}
        return any(getattr(self, key) for key in keys)


class DeepSpeedZeroConfig(SectionView):
    """The section ``zero_optimization``.

    Attributes:
        offload_param: that section as an object; ``None`` where it is not given.
        offload_optimizer: likewise.
    """

    path = "zero_optimization"

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        zero = _translated(self.path, {**keys, "stage": 3})  # which alone looks at both
        offloads = (DeepSpeedZeroOffloadParamConfig, DeepSpeedZeroOffloadOptimizerConfig)
        for kind in offloads:
            name = kind.path.rpartition(".")[2]
            inner = zero.get(name)
            setattr(self, name, None if inner is None else kind(**inner))

    @property
    def overlap_comm(self) -> bool:
        """As given; DeepSpeed's own default is true at stage 3 alone."""
        given: bool | None = self._section.overlap_comm
        return self.stage == 3 if given is None else given

    @property
    def leaf_module(self) -> SimpleNamespace:
        """The names of leaf modules, as lists."""
        found = self._section.leaf_module
        names = ("classes", "names", "name_suffixes")
        return SimpleNamespace(**{name: list(getattr(found, name)) for name in names})


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


def get_log_level(param_dict: Mapping[str, Any]) -> str | None:
    """The level that a config gives DeepSpeed's logger; ``None`` leaves it as it is."""
    level: str | None = param_dict.get("log_level", LOG_LEVEL_DEFAULT)
    return level


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


DEFAULT_LEAF_MODULE_CLASSES: list[str] = default_at("zero_optimization.leaf_module.classes")
DEFAULT_LEAF_MODULE_NAMES: list[str] = default_at("zero_optimization.leaf_module.names")
DEFAULT_LEAF_MODULE_NAME_SUFFIXES: list[str] = default_at(
    "zero_optimization.leaf_module.name_suffixes"
)
"""Modules that are leaves without being named: none here, where parts of a unit go together."""

LOG_LEVEL_DEFAULT: str | None = default_at("log_level")

GRADIENT_CLIPPING_DEFAULT: float = default_at("gradient_clipping")

ADAM_OPTIMIZER = "adam"
ADAMW_OPTIMIZER = "adamw"
ADAGRAD_OPTIMIZER = "adagrad"
LAMB_OPTIMIZER = "lamb"
LION_OPTIMIZER = "lion"
ONEBIT_ADAM_OPTIMIZER = "onebitadam"
"""Values of ``optimizer.type``, in any case."""
