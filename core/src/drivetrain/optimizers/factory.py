"""From a config's optimizer section, or a client's optimizer, to an update rule and groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from drivetrain.checked_call import call_checked
from drivetrain.errors import ConfigError
from drivetrain.known import OPTIMIZERS, TORCH_OPTIMIZERS
from drivetrain.optimizers.lamb import Lamb
from drivetrain.optimizers.lion import Lion
from drivetrain.optimizers.muon import Muon
from drivetrain.optimizers.torch_rule import TorchRule, example_parameters
from drivetrain.update_rule import OptimizerPlan, UpdateRule
from drivetrain.wording import did_you_mean

if TYPE_CHECKING:
    from drivetrain.job import Job
    from drivetrain.registry import Registry

Params = Mapping[str, Any]
Groups = list[dict[str, Any]]

_MUP = ("MuAdam", "MuAdamW", "MuSGD")


def optimizer_plan(
    name: str,
    params: Params,
    parameters: Iterable[Any],
    registry: Registry,
    job: Job | None = None,
) -> OptimizerPlan:
    """The optimizer that a config asks for, over the client's parameters.

    Args:
        name: ``optimizer.type``.
        params: ``optimizer.params``.
        parameters: parameters, (name, parameter) pairs or group dicts, as ``torch.optim`` takes.
        registry: where names that core does not know are looked up.
        job: handed to factories of plugins.

    Raises:
        ConfigError: see :func:`make_rule`.
    """
    groups = as_groups(parameters)
    mup = _match(name, _MUP)
    if mup is not None and registry.find("optimizers", name) is None:
        return rule_from_optimizer(_mup_optimizer(mup, params, groups))
    rule = make_rule(name, params, registry, job)
    for group in groups:
        for key, value in rule.defaults.items():
            group.setdefault(key, value)
    return OptimizerPlan(rule, groups)


def make_rule(name: str, params: Params, registry: Registry, job: Job | None = None) -> UpdateRule:
    """The update rule of a name.

    Core's own names come first and compare without case, then the registry's, then the classes of
    ``torch.optim`` verbatim.

    Raises:
        ConfigError: nobody serves the name, a parameter is unknown or out of range, or the class is
            not elementwise.
    """
    if "max_grad_norm" in params:
        raise ConfigError(
            "optimizer.params.max_grad_norm is not read by optimizers; set gradient_clipping"
        )
    own = _match(name, _OWN)
    if own is not None:
        return _OWN[own](params)
    entry = registry.find("optimizers", name)
    if entry is not None:
        rule = entry.load()(params, job)
        assert isinstance(rule, UpdateRule), f"{entry.label} made a {type(rule).__name__}"
        return rule
    kind = getattr(torch.optim, name, None)
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer:
        return _torch_rule(kind, params)
    raise ConfigError(_unknown(name, registry))


def rule_from_optimizer(optimizer: Optimizer) -> OptimizerPlan:
    """A client's optimizer as a rule; the plan's groups are the client's own dicts.

    Raises:
        ConfigError: the optimizer is not elementwise, or has already taken steps.
    """
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optimizer must be a torch.optim.Optimizer, got {kind}")
    taken = sum(_has_stepped(state) for state in optimizer.state.values())
    if taken:
        raise ConfigError(
            f"the given {kind} already holds states of {taken} parameters; give a new optimizer, "
            "and restore states with load_checkpoint"
        )
    return OptimizerPlan(TorchRule.from_optimizer(optimizer), optimizer.param_groups)


def as_groups(parameters: Iterable[Any]) -> Groups:
    """Group dicts from what ``torch.optim`` accepts; dicts that are given stay the same objects."""
    items = list(parameters)
    if items and all(isinstance(item, dict) for item in items):
        groups: Groups = items
    else:
        groups = [{"params": items}]
    for group in groups:
        found = group["params"]
        found = [found] if isinstance(found, torch.Tensor) else list(found)
        if found and all(isinstance(item, tuple) for item in found):
            group["param_names"] = [name for name, _ in found]
            found = [parameter for _, parameter in found]
        group["params"] = found
    return groups


def _torch_rule(kind: type[Optimizer], params: Params, **options: Any) -> TorchRule:
    template = call_checked("optimizer.params", kind, params, example_parameters())
    try:
        return TorchRule.from_optimizer(template, **options)
    except ConfigError as error:
        raise ConfigError(f"optimizer.type: {error}") from error


def _adam(params: Params, *, decoupled: bool) -> UpdateRule:
    """Adam and AdamW: decoupled decay unless ``adam_w_mode`` is false, no decay by default.

    ``torch_adam`` takes torch's class with its own parameters instead. ``set_grad_none`` is
    accepted and has no effect, since buckets own the gradients.
    """
    rest = dict(params)
    own: dict[str, bool] = {}
    for key, default in _ADAM_OPTIONS.items():
        own[key] = rest.pop(key, default)
        if not isinstance(own[key], bool):
            raise ConfigError(f"optimizer.params.{key}: expected true or false, got {own[key]!r}")
    kind = torch.optim.AdamW if decoupled or own["adam_w_mode"] else torch.optim.Adam
    if not own["torch_adam"]:
        rest.setdefault("weight_decay", 0.0)
    return _torch_rule(
        kind,
        rest,
        state_dtype=torch.float32 if own["fp32_optimizer_states"] else None,
        bias_correction=own["bias_correction"],
    )


_ADAM_OPTIONS = {
    "torch_adam": False,
    "adam_w_mode": True,
    "bias_correction": True,
    "set_grad_none": True,
    "fp32_optimizer_states": False,
}

_OWN: dict[str, Callable[[Params], UpdateRule]] = {
    "Adam": lambda params: _adam(params, decoupled=False),
    "AdamW": lambda params: _adam(params, decoupled=True),
    "Adagrad": lambda params: _torch_rule(torch.optim.Adagrad, params),
    "SGD": lambda params: _torch_rule(torch.optim.SGD, params),
    "Lion": lambda params: call_checked("optimizer.params", Lion, params),
    "Lamb": lambda params: call_checked("optimizer.params", Lamb, params),
    "Muon": lambda params: call_checked("optimizer.params", Muon, params),
}


def _match(name: str, known: Iterable[str]) -> str | None:
    return next((own for own in known if own.lower() == name.lower()), None)


def _mup_optimizer(name: str, params: Params, groups: Groups) -> Optimizer:
    try:
        mup: Any = import_module("mup")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"optimizer.type {name!r} needs the package mup, which is not installed: "
            "pip install mup"
        ) from error
    made = call_checked("optimizer.params", getattr(mup, name), params, groups)
    assert isinstance(made, Optimizer)
    return made


def _has_stepped(state: Mapping[str, Any]) -> bool:
    return bool(state) and float(state.get("step", 1)) > 0


def _unknown(name: str, registry: Registry) -> str:
    reason = registry.hidden("optimizers", name)
    if reason:
        return f"optimizer.type: {name!r} is {reason}"
    first_party = _match(name, OPTIMIZERS)
    if first_party is not None:
        distribution = OPTIMIZERS[first_party]
        return (
            f"optimizer.type: {name!r} is served by {distribution}, which is not installed: "
            f"pip install {distribution}"
        )
    known: Sequence[str] = [
        *_OWN,
        *OPTIMIZERS,
        *registry.names("optimizers"),
        *TORCH_OPTIMIZERS,
    ]
    return f"optimizer.type: no optimizer is named {name!r}{did_you_mean(name, known)}"
