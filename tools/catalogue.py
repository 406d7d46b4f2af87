"""The page of optimizers and schedules: what a config may name, with all parameters."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from drivetrain.plan.known import TORCH_OPTIMIZERS, TORCH_SCHEDULERS
from drivetrain.plan.registry import Group, Registry
from tools import workspace
from tools.api_page import thing
from tools.docstrings import Docstring

INTRODUCTION = """\
# Optimizers and schedules

What `optimizer.type` and `scheduler.type` may name, in any case, and what `optimizer.params` and
`scheduler.params` take then. An unknown parameter is refused. See [An
optimizer](../tutorial/optimizer.md) for how to make one.
"""

CLASSES = {
    "FusedAdagrad": "drivetrain_kernels.rules.FusedAdagrad",
    "FusedAdam": "drivetrain_kernels.rules.FusedAdam",
    "FusedAdamW": "drivetrain_kernels.rules.FusedAdam",
    "FusedLamb": "drivetrain_kernels.rules.FusedLamb",
    "FusedLion": "drivetrain_kernels.rules.FusedLion",
    "FusedSGD": "drivetrain_kernels.rules.FusedSGD",
    "OneBitAdam": "drivetrain_onebit.adam.OneBitAdam",
    "OneBitLamb": "drivetrain_onebit.lamb.OneBitLamb",
    "ZeroOneAdam": "drivetrain_onebit.zero_one.ZeroOneAdam",
}
"""Names served by a factory -> the class that says what the parameters mean."""

MEANINGS = {
    "adam_w_mode": "decouple weight decay from the gradient, as AdamW does",
    "amsgrad": "divide by the largest second moment so far",
    "betas": "decay of the first and second moment",
    "bias_correction": "divide the moments by `1 - beta^step`",
    "capturable": "keep the step on the device, for graphs",
    "decoupled_weight_decay": "torch's name of `adam_w_mode`",
    "differentiable": "let autograd see the update",
    "eps": "added to the root of the second moment",
    "foreach": "update lists of tensors at once",
    "fp32_optimizer_states": "keep the moments in fp32 whatever the masters are",
    "fused": "take torch's fused kernel; where there is one if not given",
    "lr": "learning rate",
    "maximize": "go up the gradient",
    "set_grad_none": "accepted, has no effect: buckets own the gradients",
    "torch_adam": "take torch's class, with its own defaults",
    "weight_decay": "weight decay",
}
"""What core's own and torch's parameters mean, where no docstring says it."""

Schema = Mapping[str, Any]
Kind = Callable[[Schema, Schema], str]


def catalogue_page(registry: Registry, kind: Kind) -> str:
    """All that the workspace serves, by distribution, and the names of torch's classes.

    Args:
        registry: where everything is installed.
        kind: says in words what values a JSON Schema allows.
    """
    parts = [INTRODUCTION]
    groups: tuple[tuple[str, Group, Group, tuple[str, ...], str], ...] = (
        ("Optimizers", "optimizers", "optimizer_params", TORCH_OPTIMIZERS, "torch.optim"),
        (
            "Schedules",
            "schedulers",
            "scheduler_params",
            TORCH_SCHEDULERS,
            "torch.optim.lr_scheduler",
        ),
    )
    for title, group, params, of_torch, module in groups:
        parts.append(f"## {title}\n")
        own = _own(registry, group)
        for name in own:
            parts += _described(registry, group, params, name, kind)
        others = [n for n in of_torch if n.lower() not in {name.lower() for name in own}]
        parts.append(f"### Classes of `{module}`\n")
        parts.append(
            f"{', '.join(f'`{name}`' for name in others)}: with torch's own parameters. Those that "
            "cannot work here are refused with the reason.\n"
        )
    return "\n".join(parts)


def _own(registry: Registry, group: Group) -> list[str]:
    known = set(workspace.load())
    served = [e for e in registry.entries(group) if e.distribution in known]
    return list(dict.fromkeys(e.name for e in served))


def _described(
    registry: Registry, group: Group, params: Group, name: str, kind: Kind
) -> Iterator[str]:
    served = [e for e in registry.entries(group) if e.name == name]
    # Core's own names are what is described, also where another package serves them faster.
    entry = min(served, key=lambda e: e.distribution != "drivetrain")
    described = thing(CLASSES[name]) if name in CLASSES else entry.load()
    doc = Docstring.of(described)
    owners = ", ".join(dict.fromkeys(e.distribution for e in served))
    yield f"### `{name}`\n\n{doc.text}\n\nServed by: {owners}.\n"
    declared = [e for e in registry.entries(params) if e.name == name]
    meanings = {**MEANINGS, **_meanings(described, doc)}
    if not declared:
        return
    schema = declared[0].load().model_json_schema()
    yield "| parameter | value | default | meaning |\n|---|---|---|---|"
    for key, field in schema.get("properties", {}).items():
        default = f"`{json.dumps(field['default'])}`" if "default" in field else "required"
        value = kind(field, schema.get("$defs", {})).replace("|", "\\|")
        yield f"| `{key}` | {value} | {default} | {meanings.get(key, '')} |"
    yield ""


def _meanings(target: Any, doc: Docstring) -> dict[str, str]:
    """What arguments mean, also those that a base class describes."""
    bases = reversed(inspect.getmro(target)) if inspect.isclass(target) else ()
    found: dict[str, str] = {}
    for base in bases:
        if base.__module__.startswith("drivetrain") and base.__doc__:
            said = Docstring.parse(inspect.cleandoc(base.__doc__)).meanings()
            found.update({n: text for n, text in said.items() if not text.startswith("see `")})
    return {**doc.meanings(), **found}
