"""From a config as DeepSpeed reads it to one as Drivetrain reads it, with a line for each change.

What means the same to both is left alone, also where core accepts a key without effect: it says so
itself. What happens here is what only DeepSpeed does: deprecated spellings, keys that it reads and
that mean nothing here, switches that are off by default, ``null``, and keys that it never looks at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepspeed._config.keys import DEFAULTS, OPEN
from deepspeed._parts.schedules import VALID_LR_SCHEDULES
from drivetrain.plan.known import SECTIONS
from drivetrain.plan.registry import Registry
from drivetrain.wording import as_json, did_you_mean

Config = dict[str, Any]

LOOSE = frozenset(
    ("activation_checkpointing", "aio", "checkpoint", "eigenvalue", "optimizer", "scheduler")
)
"""Sections in which DeepSpeed never looks at keys that it does not know."""

WITHOUT_EFFECT: Mapping[str, str] = {
    "check_overflow": "gradients are checked where fp16 or bf16 asks for it",
    "disable_python_gc": "the collector of Python is left alone",
    "zero_optimization.cpu_offload_use_pin_memory": "offload_optimizer.pin_memory says it",
    "zero_optimization.grad_hooks": "gradients are always taken as they appear",
    "zero_optimization.offload_optimizer.pipeline": "pipeline_read and pipeline_write say it",
}
"""Keys that DeepSpeed reads and that decide nothing here -> why."""

WORKS_HERE: Mapping[str, str] = {
    "compute_grad_norm": "`false` leaves the norm out until it is asked for",
}
"""Keys that core accepts without effect and that this package acts upon -> a remark."""

OFFLOADS = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "cpu_offload_params": "offload_param",
}


@dataclass
class Translation:
    """A translated config.

    Args:
        config: as core reads it.
        notes: keys without effect and deprecated spellings: path and reason.
        ignored: keys that DeepSpeed never looks at, which are most likely mistakes.
    """

    config: Config
    notes: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def translate(config: Mapping[str, Any], registry: Registry | None = None) -> Translation:
    """Translate a config.

    Args:
        config: as it was given, read from its file; not changed.
        registry: what is installed; its sections are known keys.
    """
    done = Translation(_without_nulls(config))
    steps = (
        *(_steps_per_print, _old_zero, _offloaded_parameters, _spellings, _scaling),
        *(_drop_dead, _switch_off, _parallelism, _compression),
    )
    for step in steps:
        step(done)
    _drop_unknown(done, registry or Registry.installed())
    return done


def _without_nulls(section: Mapping[str, Any], path: str = "") -> Config:
    """A deep copy without keys that are ``null``, which DeepSpeed takes for not given."""
    copy: Config = {}
    for key, value in section.items():
        where = f"{path}{key}"
        if isinstance(value, Mapping) and where not in OPEN:
            copy[key] = _without_nulls(value, f"{where}.")
        elif value is not None or path.removesuffix(".") in OPEN:
            copy[key] = value
    return copy


def _steps_per_print(done: Translation) -> None:
    value = done.config.get("steps_per_print")
    if isinstance(value, float) and math.isinf(value):  # Accelerate's way to say never
        done.config["steps_per_print"] = 0


def _old_zero(done: Translation) -> None:
    zero = done.config.get("zero_optimization")
    if isinstance(zero, bool):
        done.config["zero_optimization"] = {"stage": int(zero)}
        done.notes.append(f'zero_optimization: {as_json(zero)} is {{"stage": {int(zero)}}}')
    if not isinstance(zero, dict):
        return
    for old, new in OFFLOADS.items():
        if old not in zero:
            continue
        if zero.pop(old) is True and new not in zero:
            zero[new] = {"device": "cpu"}
            done.notes.append(f'zero_optimization.{old}: is {new}: {{"device": "cpu"}}')
        else:
            done.notes.append(f"zero_optimization.{old}: no effect, {new} decides")


def _offloaded_parameters(done: Translation) -> None:
    """Drop what DeepSpeed never looks at below stage 3."""
    zero = done.config.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2):
        return
    section = zero.get("offload_param")
    if isinstance(section, dict) and section.get("device", "none") != "none":
        del zero["offload_param"]
        done.ignored.append(
            "zero_optimization.offload_param: DeepSpeed looks at it at stage 3 alone, so it has no "
            "effect here either; parameters stay on the device"
        )


def _spellings(done: Translation) -> None:
    """Write values as Drivetrain does that DeepSpeed takes in several ways."""
    _numbers_and_switches(done.config, DEFAULTS)
    if isinstance(operation := done.config.get("gradient_allreduce_op"), str):
        done.config["gradient_allreduce_op"] = operation.lower()
    scheduler = done.config.get("scheduler")
    scheduler = scheduler if isinstance(scheduler, dict) else {}
    params = scheduler.get("params")
    known = scheduler.get("type") in VALID_LR_SCHEDULES  # others may have kinds of their own
    params = params if known and isinstance(params, dict) else {}
    if params.get("warmup_type", "log") not in ("log", "linear"):
        done.notes.append(
            f'scheduler.params.warmup_type: {as_json(params["warmup_type"])} is "log"'
        )
        scheduler["params"] = {**params, "warmup_type": "log"}
    zero = done.config.get("zero_optimization")
    leaves = zero.get("leaf_module") if isinstance(zero, dict) else None
    if isinstance(leaves, dict):
        leaves.update({key: [one] for key, one in leaves.items() if isinstance(one, str)})


def _numbers_and_switches(section: Config, defaults: Mapping[str, Any]) -> None:
    """Make booleans of 0 and 1, and inside of sections numbers of texts, as DeepSpeed reads them.

    Args:
        section: of the config, or all of it; changed.
        defaults: DeepSpeed's, which tell what is a boolean or a number.
    """
    for key, default in defaults.items():
        value = section.get(key)
        if isinstance(default, bool) and type(value) is int and value in (0, 1):
            section[key] = bool(value)
        elif isinstance(value, str) and type(default) in (int, float) and defaults is not DEFAULTS:
            section[key] = _number(value)
        elif isinstance(default, Mapping) and isinstance(value, dict):
            _numbers_and_switches(value, default)


def _number(text: str) -> int | float | str:
    """What a text says as a number; itself if it is none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _scaling(done: Translation) -> None:
    """Drop what a loss scale that follows overflows would need, where it does not."""
    fp16 = done.config.get("fp16")
    if not isinstance(fp16, dict):
        return
    scale = fp16.get("loss_scale", 0)
    fixed = isinstance(scale, (int, float)) and scale > 0
    if fixed or fp16.get("enabled") in (None, False):
        for key in ("loss_scale_window", "min_loss_scale"):
            if fp16.pop(key, None) is not None:
                reason = "the loss scale is fixed" if fixed else "fp16 is off"
                done.notes.append(f"fp16.{key}: no effect, {reason}")


def _drop_dead(done: Translation) -> None:
    for path, reason in WITHOUT_EFFECT.items():
        *above, key = path.split(".")
        section: Any = done.config
        for name in above:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and key in section:
            del section[key]
            done.notes.append(f"{path}: no effect, {reason}")


def _switch_off(done: Translation) -> None:
    """Say of sections that they are off where DeepSpeed has them off unless ``enabled`` is given.

    ``comms_logger`` is none of them: there its presence is enough.
    """
    for name, default in DEFAULTS.items():
        section = done.config.get(name)
        off = isinstance(default, Mapping) and default.get("enabled") is False
        if off and name != "comms_logger" and isinstance(section, dict) and section:
            section.setdefault("enabled", False)


def _parallelism(done: Translation) -> None:
    """Drop what asks for an axis of one rank."""
    config = done.config
    reason = "activations travel in the dtype that they have, gradients as all others"
    _drop(done, "seq_parallel_communication_data_type", reason)
    tensor = config.get("tensor_parallel")
    keys = ("autotp_size", "tp_size")
    if isinstance(tensor, dict) and all(tensor.get(key, 1) in (0, 1) for key in keys):
        _drop(done, "tensor_parallel", "it asks for one rank")


def _compression(done: Translation) -> None:
    """Drop methods that change no module, and what only steers such a method."""
    methods = done.config.get("compression_training")
    methods = methods if isinstance(methods, dict) else {}
    for name, method in list(methods.items()):
        if not isinstance(method, dict) or method.get("different_groups") != {}:
            continue
        shared = method.get("shared_parameters")
        prunes_all = isinstance(shared, dict) and shared.get("method") == "snip_momentum"
        if not prunes_all:
            del methods[name]
            done.notes.append(
                f"compression_training.{name}: no effect, its different_groups is empty"
            )
    if not _method_is_on(methods.get("weight_quantization")):
        section = done.config.get("eigenvalue")
        if isinstance(section, dict) and section.get("enabled") is True:
            _drop(done, "eigenvalue", "it steers compression_training.weight_quantization alone")


def _method_is_on(method: object) -> bool:
    shared = method.get("shared_parameters") if isinstance(method, dict) else None
    return isinstance(shared, dict) and shared.get("enabled") not in (None, False)


def _drop(done: Translation, key: str, reason: str) -> None:
    if done.config.pop(key, None) is not None:
        done.notes.append(f"{key}: no effect, {reason}")


def _drop_unknown(done: Translation, registry: Registry) -> None:
    ours = {path.split(".")[0] for path in (*registry.names("plugins", hidden=True), *SECTIONS)}
    known = {*DEFAULTS, *ours, "plugins", "bfloat16"}
    _forget(done, done.config, "", known)
    for name in LOOSE & done.config.keys():
        section = done.config[name]
        if isinstance(section, dict):
            inner = {p.removeprefix(f"{name}.") for p in registry.names("plugins")}
            _forget(
                done, section, f"{name}.", {*DEFAULTS[name], *_own_keys(registry, name), *inner}
            )


def _own_keys(registry: Registry, name: str) -> set[str]:
    """Keys that Drivetrain's section of that name has beyond DeepSpeed's."""
    entry = registry.find("plugins", name)
    return set() if entry is None else set(entry.load().sections[name].model_fields)


def _forget(done: Translation, section: Config, prefix: str, known: set[str]) -> None:
    for key in [key for key in section if key not in known]:
        del section[key]
        done.ignored.append(
            f"{prefix}{key}: DeepSpeed has no such key and never looks at it, so it has no effect "
            f"here either{did_you_mean(key, sorted(known))}"
        )
