"""Layers that are described before they are built, so that each rank builds only its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError


class LayerSpec:
    """A layer to be built later, where it is needed.

    Args:
        typename: class of the layer, a subclass of ``torch.nn.Module``.
        module_args: arguments of its constructor.
        module_kwargs: keyword arguments of its constructor.

    Raises:
        ConfigError: ``typename`` is no class of modules.
    """

    def __init__(self, typename: type[nn.Module], *module_args: Any, **module_kwargs: Any) -> None:
        kind: object = typename
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ConfigError(
                f"a LayerSpec needs a subclass of torch.nn.Module, got {kind!r}; a function can be "
                "a layer as it is"
            )
        self.typename = typename
        self.module_args = module_args
        self.module_kwargs = module_kwargs

    def __repr__(self) -> str:
        given = [repr(value) for value in self.module_args]
        given += [f"{name}={value!r}" for name, value in self.module_kwargs.items()]
        return f"{type(self).__name__}({', '.join([self.typename.__name__, *given])})"

    def build(self, log: bool = False) -> nn.Module:
        """Make the layer.

        Args:
            log: without effect.
        """
        return self.typename(*self.module_args, **self.module_kwargs)


class TiedLayerSpec(LayerSpec):
    """A layer that shares its parameters with all others of the same key.

    Args:
        key: what they have in common; each stage has one module for it.
        typename: class of the module.
        module_args: arguments of its constructor.
        forward_fn: called as ``forward_fn(module, input)`` in place of the module, such as for an
            embedding that is used as a head.
        tied_weight_attr: parameters of the module that have to exist. All of its parameters are
            shared, as in one process.
        module_kwargs: keyword arguments of its constructor.
    """

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *module_args: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        tied_weight_attr: str | Iterable[str] = ("weight",),
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key = key
        self.forward_fn = forward_fn
        names = (tied_weight_attr,) if isinstance(tied_weight_attr, str) else tied_weight_attr
        self.tied_weight_attr = list(names)

    def build(self, log: bool = False) -> nn.Module:
        module = super().build(log)
        known = dict(module.named_parameters())
        lacking = [name for name in self.tied_weight_attr if name not in known]
        if lacking:
            raise ConfigError(
                f"TiedLayerSpec {self.key!r}: {self.typename.__name__} has no parameter "
                f"{lacking[0]!r}; it has {', '.join(known) or 'none'}"
            )
        return module


def refuse_unlike_ties(layers: Sequence[Layer]) -> None:
    """Check that layers of one key can be one module, whose parameters stages share.

    Of layers that cannot be built without memory, their classes alone are compared.

    Raises:
        ConfigError: they are of other classes, or have other parameters.
    """
    known: dict[str, tuple[int, TiedLayerSpec]] = {}
    for number, spec in enumerate(layers):
        if not isinstance(spec, TiedLayerSpec):
            continue
        other, first = known.setdefault(spec.key, (number, spec))
        if first is spec:
            continue
        shapes = [_shapes(each) for each in (first, spec)]
        if first.typename is not spec.typename or (None not in shapes and shapes[0] != shapes[1]):
            raise ConfigError(
                f"TiedLayerSpec {spec.key!r}: layer {other} is {first} and layer {number} {spec}, "
                "which cannot be one module that stages share: describe them alike, and give what "
                "the second does with it as forward_fn"
            )


def _shapes(spec: LayerSpec) -> dict[str, tuple[int, ...]] | None:
    """Shapes of parameters, by their names; ``None`` of a layer that needs memory to be built."""
    module = _without_memory(spec)
    return None if module is None else {n: tuple(p.shape) for n, p in module.named_parameters()}


def _without_memory(spec: LayerSpec) -> nn.Module | None:
    """The layer on the meta device; ``None`` if it cannot be built there.

    Constructors that read values, copy pretrained ones or name a device raise whatever they like.

    Raises:
        ConfigError: the description is wrong on any device.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return spec.build()
    except ConfigError:
        raise
    except Exception:  # noqa: BLE001  # a constructor of the client's raises what it likes
        return None


Layer = LayerSpec | nn.Module | Callable[[Any], Any]
"""What a :class:`~drivetrain_pipeline.module.PipelineModule` is made of."""


def kind_of(layer: Layer) -> str:
    """The name of a layer's class."""
    if isinstance(layer, LayerSpec):
        return layer.typename.__name__
    return type(layer).__name__ if isinstance(layer, nn.Module) else "function"


def count_parameters(layer: Layer) -> int:
    """The trainable parameters of a layer.

    One that is not built yet takes no memory, unless its constructor needs some.
    """
    if isinstance(layer, LayerSpec):
        module = _without_memory(layer)
        if module is None:
            with torch.random.fork_rng():
                module = layer.build()
        layer = module
    if not isinstance(layer, nn.Module):
        return 0
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)
