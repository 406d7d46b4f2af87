"""Experts of any model, found by structure: the modules that hold them, and how these compute.

There are three forms, and no list of models:

- *fused*: all parameters have one row, or an equal number of rows, for each expert, and the forward
  takes tokens, numbers of their experts and weights. Transformers builds most mixtures so.
- *blocks*: fused as well, but the forward takes one block of rows for each expert, of equal size,
  one after another. Llama 4 has this form: the rows of a token that has not chosen an expert are
  zeros there.
- *listed*: a list or dictionary of modules of one class with parameters of equal shapes, beside a
  router, which has a parameter with one row for each of them. Switch Transformers and NLLB have
  this form, and models written for Transformers before its version 5.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_moe.experts import ExpertList
from drivetrain_moe.section import EXPERT_PARALLEL

Form = Literal["fused", "blocks", "listed"]


@dataclass(frozen=True)
class FoundExperts:
    """A module with the experts of a layer.

    Args:
        name: its path in the model.
        module: itself.
        counter: name of its attribute that has the number of experts; empty if listed.
        count: that number.
        parent: the module that it is in, with the router.
        form: how it computes.
    """

    name: str
    module: nn.Module
    counter: str
    count: int
    parent: nn.Module
    form: Form = "fused"

    @property
    def owner(self) -> nn.Module:
        """The module whose forward calls the experts: a plain list has none of its own."""
        plain = type(self.module).forward is nn.Module.forward
        return self.parent if self.form == "listed" and plain else self.module


def find_experts(model: nn.Module, pattern: str | None = None) -> list[FoundExperts]:
    """Find the modules of ``model`` that have the experts of a layer.

    Args:
        model: whose modules are looked at; nothing inside of one that is found.
        pattern: regular expression that their names match as a whole.

    Raises:
        ConfigError: ``pattern`` names a module that has another structure; says which. Or experts
            of one list have different shapes.
    """
    found: list[FoundExperts] = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        inside = any(name.startswith(f"{other.name}.") for other in found)
        if not name or inside or (pattern and not re.fullmatch(pattern, name)):
            continue
        parent = modules[name.rpartition(".")[0]]
        one = _structure(name, module, parent, named=bool(pattern))
        if isinstance(one, FoundExperts):
            found.append(one)
        elif pattern:
            raise ConfigError(f"{EXPERT_PARALLEL}.expert_pattern: {name} {one}")
    return found


def _structure(
    name: str, module: nn.Module, parent: nn.Module, *, named: bool = False
) -> FoundExperts | str:
    """A module with experts, or why it is none."""
    listed = _listed(name, module, parent, named=named)
    return listed or _fused(name, module, parent)


def nothing_found(model: nn.Module) -> str:
    """Why ``model`` has no experts, as a message: what was looked for, and what comes nearest."""
    modules = dict(model.named_modules())
    like = [
        f"{name} {reason}"
        for name, module in modules.items()
        if "expert" in name.rpartition(".")[2]
        and isinstance(reason := _structure(name, module, modules[name.rpartition(".")[0]]), str)
    ]
    seen = f"; nearest: {like[0]}" if like else ""
    return (
        f"{EXPERT_PARALLEL}: {type(model).__name__} has no module that looks like the experts of a "
        "layer: fused tensors with a row for each and a forward of tokens, numbers of experts and "
        "weights (or of a block of rows for each), or a list of equal modules beside a router"
        f"{seen}; name the modules with experts by {EXPERT_PARALLEL}.expert_pattern, place "
        "drivetrain_moe.MoE in the model, or leave the section out"
    )


def experts_in(container: nn.Module) -> Mapping[str, nn.Module]:
    """The children of a list that are its experts: those of the class that most of them have."""
    kinds = Counter(type(child) for child in container.children() if has_parameters(child))
    if not kinds:
        return {}
    (kind, _) = kinds.most_common(1)[0]
    return {name: child for name, child in container.named_children() if type(child) is kind}


def has_parameters(module: nn.Module) -> bool:
    """True if ``module`` has any."""
    return next(module.parameters(), None) is not None


def _fused(name: str, module: nn.Module, parent: nn.Module) -> FoundExperts | str:
    """A module with fused experts, or why it is none."""
    parameters = list(module.parameters())
    if not parameters:
        return "has no parameters"
    own = {k: v for k, v in vars(module).items() if "expert" in k and type(v) is int and v > 1}
    fitting = [
        key
        for key, count in own.items()
        if all(p.dim() and p.shape[0] % count == 0 for p in parameters)
        and all(p.shape[0] == count for p in parameters if p.dim() == 3)
        and any(p.dim() == 3 for p in parameters)
        | all(p.dim() == 2 and p.shape[0] > count for p in parameters)
    ]
    if not fitting:
        shapes = ", ".join(str(tuple(p.shape)) for p in parameters[:4])
        return (
            "has no attribute of a number of experts which divides the first dimension of all its "
            f"parameters ({shapes})"
        )
    needed = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) not in (1, 3):
        names = ", ".join(p.name for p in needed)
        return f"has a forward of ({names}), not of tokens, numbers of experts and weights"
    form: Form = "fused" if len(needed) == 3 else "blocks"
    counter, direct = fitting[0], [p for p in module._parameters.values() if p is not None]
    if form == "blocks" and (len(direct) < len(parameters) or all(p.dim() < 3 for p in direct)):
        return "has a forward of tokens alone, and weights inside of other modules"
    return FoundExperts(name, module, counter, getattr(module, counter), parent, form)


def _listed(name: str, module: nn.Module, parent: nn.Module, *, named: bool) -> FoundExperts | str:
    """A list of experts, or why it is none; an empty string if it is no list at all."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or isinstance(module, ExpertList):
        return ""
    if not named and "expert" not in name.rpartition(".")[2]:
        return ""
    experts = list(experts_in(module).values())
    if len(experts) < 2:
        return "has fewer than two modules of one class with parameters"
    shapes = [{n: tuple(p.shape) for n, p in expert.named_parameters()} for expert in experts]
    other = next((i for i, each in enumerate(shapes) if each != shapes[0]), None)
    if other is not None:
        raise ConfigError(
            f"{EXPERT_PARALLEL}: {name} has experts of different shapes: 0 has {shapes[0]}, "
            f"{other} has {shapes[other]}, so ranks would have unequal parts; leave it out with "
            f"{EXPERT_PARALLEL}.expert_pattern"
        )
    inside = {id(p) for p in module.parameters()}
    beside = [p for p in parent.parameters() if id(p) not in inside]
    if not any(len(experts) in p.shape for p in beside):
        return (
            f"is a list of {len(experts)} modules without a router beside it: no parameter of "
            f"{name.rpartition('.')[0] or 'the model'} has a row for each of them"
        )
    return FoundExperts(name, module, "", len(experts), parent, "listed")
