"""What a module's weight, bias and inputs go through in its forward, step by step.

A compressed module keeps its class as a base, its parameters and their names: forward shows it
other tensors in their place. So states that shard parameters see ordinary parameters, a weight is
changed where it is whole, and what a subclass does in its forward stays as it is.

[Note: computed again] What forward makes of a weight is as large as the weight. Autograd would keep
it until backward, and with it, where parameters are sharded, the whole model. So it keeps how to
make it, and backward makes it again of the parameter, which is whole then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError, TrainingError

_ATTRIBUTE = "drivetrain_compression"
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class Step:
    """One change of a module's tensors in its forward; the same in forward and backward.

    Attributes:
        order: place among the steps of a module.
        active: ``False`` leaves everything as it is.

    Args:
        owner: label of the modifier that it belongs to.
    """

    order = 0

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.active = False

    def weight(self, module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """The weight to compute with, differentiable in ``weight``."""
        return weight

    def bias(self, module: nn.Module, bias: torch.Tensor) -> torch.Tensor:
        """The bias to compute with, differentiable in ``bias``."""
        return bias

    def inputs(self, module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """The first argument to compute with, differentiable in ``inputs``."""
        return inputs


class Chain:
    """The steps of one module, in order."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def add(self, step: Step) -> None:
        """Put a step in its place; those of one order run as they were added."""
        self.steps = sorted([*self.steps, step], key=lambda known: known.order)

    def value(self, module: nn.Module, name: str) -> torch.Tensor | None:
        """What forward uses in place of the parameter ``name`` (weight or bias)."""
        value: torch.Tensor | None = module._parameters.get(name)
        if value is None:
            return None
        for step in self.steps:
            if step.active:
                value = getattr(step, name)(module, value)
        return value

    def run(self, module: nn.Module, inner: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Call the module's own forward with the tensors that the steps make."""
        if not any(step.active for step in self.steps):
            return inner(*args, **kwargs)
        shown = {}
        for name in ("weight", "bias"):
            value = self.value(module, name)
            if value is not None and value is not module._parameters.get(name):
                shown[name] = value
        args, kwargs = self._with_inputs(module, args, kwargs)
        again = _Again(self, module, shown)
        with _shown(module, shown), torch.autograd.graph.saved_tensors_hooks(again.pack, _unpack):
            return inner(*args, **kwargs)

    def _with_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        if args:
            return (self._inputs(module, args[0]), *args[1:]), kwargs
        if "input" in kwargs:
            kwargs = {**kwargs, "input": self._inputs(module, kwargs["input"])}
        return args, kwargs

    def _inputs(self, module: nn.Module, inputs: Any) -> Any:
        if not isinstance(inputs, torch.Tensor) or not inputs.is_floating_point():
            return inputs  # an embedding's indices
        for step in self.steps:
            if step.active:
                inputs = step.inputs(module, inputs)
        return inputs


class _Again:
    """See [Note: computed again].

    Args:
        chain: makes values of parameters.
        module: has the parameters.
        shown: the values that forward uses.
    """

    def __init__(self, chain: Chain, module: nn.Module, shown: Mapping[str, torch.Tensor]) -> None:
        self._chain, self._module = chain, module
        self._storages = {value.untyped_storage()._cdata: name for name, value in shown.items()}

    def pack(self, tensor: torch.Tensor) -> Any:
        name = self._storages.get(tensor.untyped_storage()._cdata)
        if name is None:
            return tensor
        geometry = tensor.shape, tensor.stride(), tensor.storage_offset()
        return self, name, geometry, self._version(name)

    def unpack(self, name: str, geometry: Any, version: int | None) -> torch.Tensor:
        if version != self._version(name):
            raise TrainingError(
                f"the {name} of a compressed {type(self._module).__name__} was changed in place "
                "between its forward and its backward; run backward before the update"
            )
        with torch.no_grad():
            value = self._chain.value(self._module, name)
        assert value is not None, "it was there in forward"
        return value.as_strided(*geometry)

    def _version(self, name: str) -> int | None:
        parameter = self._module._parameters[name]
        # Gathering a shard writes into the whole.
        sharded = parameter is None or hasattr(parameter, "drivetrain_handle")
        return None if sharded else parameter._version  # type: ignore[union-attr]


def _unpack(packed: Any) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    again, *rest = packed
    found: torch.Tensor = again.unpack(*rest)
    return found


@contextmanager
def _shown(module: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let ``module.weight`` be another tensor; its parameters stay where they are."""
    module.__dict__.update(values)
    try:
        yield
    finally:
        for name in values:
            module.__dict__.pop(name, None)


class Compressed(nn.Module):
    """Base of the classes that compressed modules get, before their own.

    Attributes:
        drivetrain_plugin: the plugin that has to take part where such a module is trained.
    """

    drivetrain_plugin = "compression_training"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with other tensors."""
        return self.__dict__[_ATTRIBUTE].run(self, super().forward, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the class that the module had."""
        return _empty, (type(self).__mro__[2],), self.__dict__.copy()


def _class_for(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Compressed{kind.__name__}", (Compressed, kind), {})
    return _CLASSES[kind]


def _empty(kind: type[nn.Module]) -> nn.Module:
    made = _class_for(kind)
    return made.__new__(made)


def chain_of(module: nn.Module) -> Chain | None:
    """The steps of a compressed module; ``None`` if it is none."""
    found: Chain | None = module.__dict__.get(_ATTRIBUTE)
    return found


def compress_module(module: nn.Module, name: str) -> Chain:
    """Give a module a chain, or return the one that it has.

    Args:
        module: changed in place: it gets a subclass of its class.
        name: in messages.

    Raises:
        ConfigError: its forward is no method of its class, so it would not see other tensors.
    """
    known = chain_of(module)
    if known is not None:
        return known
    if isinstance(module, torch.jit.ScriptModule):
        raise ConfigError(f"{name} is scripted, so its weight cannot be changed in forward")
    if "forward" in module.__dict__:
        raise ConfigError(
            f"{name} ({type(module).__name__}) has a forward of its own, set on the object: "
            "compress the model before what replaces forwards"
        )
    module.__dict__[_ATTRIBUTE] = chain = Chain()
    module.__class__ = _class_for(type(module))
    return chain


def restore_module(module: nn.Module) -> None:
    """Give a compressed module the class that it had."""
    if chain_of(module) is not None:
        del module.__dict__[_ATTRIBUTE]
        module.__class__ = type(module).__mro__[2]


def remove_steps(module: nn.Module, owner: str) -> None:
    """Take the steps of a modifier away; the last one restores the module."""
    chain = chain_of(module)
    if chain is not None:
        chain.steps = [step for step in chain.steps if step.owner != owner]
        if not chain.steps:
            restore_module(module)
