"""From a config's optimizer section, or a client's optimizer, to an update rule and groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from drivetrain.checked_call import call_checked
from drivetrain.contracts.state.bucket import OptimizerPlan, UpdateRule
from drivetrain.errors import ConfigError, PluginError
from drivetrain.optimization.torch_rule import TorchRule, example_parameters
from drivetrain.plan.known import TORCH_OPTIMIZERS
from drivetrain.plan.params import check_params, declared_params
from drivetrain.wording import did_you_mean

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain.plan.registry import Registry

Params = Mapping[str, Any]
RuleFactory = Callable[[Params, "Job"], UpdateRule]

PARAMS = "optimizer.params"


def optimizer_plan(
    name: str, params: Params, parameters: Iterable[Any], registry: Registry, job: Job
) -> OptimizerPlan:
    """The optimizer that a config asks for, over the client's parameters.

    Args:
        name: ``optimizer.type``.
        params: ``optimizer.params``.
        parameters: parameters, (name, parameter) pairs or group dicts, as ``torch.optim`` takes.
        registry: where the name is looked up first.
        job: handed to the factory.

    Raises:
        ConfigError: see :func:`make_rule`.
    """
    rule = make_rule(name, params, registry, job)
    groups = as_groups(parameters)
    for group in groups:
        for key, value in rule.defaults.items():
            group.setdefault(key, value)
    return OptimizerPlan(rule, groups)


def make_rule(name: str, params: Params, registry: Registry, job: Job) -> UpdateRule:
    """The update rule of a name: a registered one, or else that of a ``torch.optim`` class.

    What is registered is a subclass of :class:`UpdateRule`, whose keyword arguments are the
    parameters, or a factory.

    Raises:
        ConfigError: nobody serves the name, a parameter is unknown or out of range, or the class is
            not elementwise.
        PluginError: a factory does not load, or makes something else.
    """
    entry = registry.find("optimizers", name)
    if (model := declared_params(registry, "optimizer", name)) is not None:
        params = check_params(model, "optimizer", params)
    if entry is not None:
        made = entry.load()
        is_rule = isinstance(made, type) and issubclass(made, UpdateRule)
        rule = call_checked(PARAMS, made, params) if is_rule else made(params, job)
        if not isinstance(rule, UpdateRule):
            raise PluginError(f"{entry.label} made a {type(rule).__name__}, not an UpdateRule")
        return rule
    known = next((own for own in TORCH_OPTIMIZERS if own.lower() == name.lower()), name)
    kind = getattr(torch.optim, known, None)
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer:
        return torch_rule(kind, params)
    names = [*registry.names("optimizers"), *TORCH_OPTIMIZERS]
    raise ConfigError(f"optimizer.type: no optimizer is named {name!r}{did_you_mean(name, names)}")


def rule_from_optimizer(optimizer: Optimizer) -> OptimizerPlan:
    """A client's optimizer as a rule; the plan's groups are the client's own dicts.

    Raises:
        ConfigError: it is no torch optimizer, is not elementwise, or has already taken steps.
    """
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optimizer must be a torch.optim.Optimizer, got {kind}")
    # Adagrad makes its states in the constructor, at step 0.
    taken = sum(bool(s) and float(s.get("step", 1)) > 0 for s in optimizer.state.values())
    if taken:
        raise ConfigError(
            f"the given {kind} already holds states of {taken} parameters; give a new optimizer, "
            "and restore states with load_checkpoint"
        )
    return OptimizerPlan(TorchRule(optimizer), optimizer.param_groups)


def as_groups(parameters: Iterable[Any]) -> list[dict[str, Any]]:
    """Group dicts from what ``torch.optim`` accepts; dicts that are given stay the same objects."""
    items = list(parameters)
    grouped = items and all(isinstance(item, dict) for item in items)
    groups: list[dict[str, Any]] = items if grouped else [{"params": items}]
    for group in groups:
        found = group["params"]
        found = [found] if isinstance(found, torch.Tensor) else list(found)
        if found and all(isinstance(item, tuple) for item in found):
            group["param_names"] = [name for name, _ in found]
            found = [parameter for _, parameter in found]
        group["params"] = found
    return groups


def torch_rule(kind: type[Optimizer], params: Params, **options: Any) -> TorchRule:
    """The rule of a torch class, with errors under the config's paths."""
    template = call_checked(PARAMS, kind, params, example_parameters())
    try:
        return TorchRule(template, **options)
    except ConfigError as error:
        raise ConfigError(f"optimizer.type: {error}") from error


def adam(params: Params, job: Job) -> UpdateRule:
    """Adam, with decoupled weight decay unless ``adam_w_mode`` is false.

    ``torch_adam`` takes torch's class with its own defaults; ``fp32_optimizer_states`` keeps the
    moments in fp32 whatever the masters are. ``set_grad_none`` is accepted and has no effect, since
    buckets own the gradients.
    """
    rest = dict(params)
    flags = {
        "torch_adam": False,
        "adam_w_mode": True,
        "bias_correction": True,
        "set_grad_none": True,
        "fp32_optimizer_states": False,
    }
    for key in flags.keys() & params.keys():
        flags[key] = rest.pop(key)
        if not isinstance(flags[key], bool):
            raise ConfigError(f"{PARAMS}.{key}: expected true or false, got {flags[key]!r}")
    if not flags["torch_adam"]:
        rest.setdefault("weight_decay", 0.0)
    return torch_rule(
        torch.optim.AdamW if flags["adam_w_mode"] else torch.optim.Adam,
        rest,
        state_dtype=torch.float32 if flags["fp32_optimizer_states"] else None,
        bias_correction=flags["bias_correction"],
    )


def adamw(params: Params, job: Job) -> UpdateRule:
    """:func:`adam` with decoupled weight decay, whatever ``adam_w_mode`` says."""
    return adam({**params, "adam_w_mode": True}, job)
