"""What takes the place of a part of the model on ranks that do not have it.

Such a part has its tensors on the meta device, outside of ``parameters()`` and ``buffers()``. In a
forward it returns zeros of the shapes that it would return; what becomes of them is thrown away,
as the first own unit gets the values that the stage before has sent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from drivetrain.errors import TrainingError

logger = logging.getLogger("drivetrain.pipeline")

Make = Callable[[torch.Tensor], torch.Tensor]
"""Makes a tensor without values of the shape and dtype of another."""


_DROPPED = "_pipeline_dropped"
"""Attribute of a module: names of tensors that were taken away."""


def drop_tensors(
    module: nn.Module,
    device: torch.device,
    parameters: torch.dtype | None,
    buffers: torch.dtype | None,
) -> None:
    """Take all parameters and buffers of ``module`` away; zeros that take no memory stay.

    Args:
        module: changed in place.
        device: where the model computes.
        parameters: dtype that floating parameters would have in the job; ``None``: their own.
        buffers: likewise.
    """
    for part in module.modules():
        for tensors, dtype in ((part._parameters, parameters), (part._buffers, buffers)):
            names = [name for name, tensor in tensors.items() if tensor is not None]
            for name in names:
                tensor = tensors.pop(name)
                assert tensor is not None
                zeros = _zeros(tensor, device)
                other = dtype if dtype is not None and zeros.is_floating_point() else zeros.dtype
                vars(part)[name] = _zeros(zeros.to(other), device)
            vars(part).setdefault(_DROPPED, []).extend(names)
        part._non_persistent_buffers_set.clear()


def dropped_tensors(module: nn.Module) -> list[torch.Tensor]:
    """The zeros in the place of tensors that were taken away."""
    return [vars(part)[name] for part in module.modules() for name in vars(part).get(_DROPPED, ())]


class StandIn:
    """Returns zeros in the shapes of what a part would return.

    Shapes come from a forward without values, once for each kind of arguments.

    Args:
        name: of the part, for messages.
        module: the part.
        forward: its own forward, unbound.
    """

    def __init__(self, name: str, module: nn.Module, forward: Any) -> None:
        self._name = name
        self._module = module
        self._forward = forward
        self._known: dict[Any, Any] = {}

    def __call__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device
    ) -> Any:
        """Return zeros on ``device``.

        Raises:
            TrainingError: the part cannot run without values, so it cannot be left out.
        """
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        key = (spec, tuple(_kind(leaf) for leaf in leaves), torch.is_grad_enabled())
        if key not in self._known:
            output = self._output(leaves, spec, device)
            self._known[key] = pytree.tree_map_only(torch.Tensor, _on_meta, output)
        return pytree.tree_map_only(
            torch.Tensor,
            lambda t: torch.zeros(t.shape, dtype=t.dtype, device=device),
            self._known[key],
        )

    def _output(self, leaves: list[Any], spec: Any, device: torch.device) -> Any:
        """Run the part without values: on the meta device, or with zeros that take no memory.

        The latter is for parts whose code looks at values, such as experts that ask which tokens
        they have got.
        """
        on_meta = [_on_meta(x) if isinstance(x, torch.Tensor) else x for x in leaves]
        try:
            return self._run(on_meta, spec, _on_meta)
        except Exception as error:  # noqa: BLE001  the client's code may raise anything
            logger.debug("%s does not run on the meta device: %s", self._name, error)
        zeros = [_zeros(x, device) if isinstance(x, torch.Tensor) else x for x in leaves]
        try:
            return self._run(zeros, spec, lambda tensor: _zeros(tensor, device))
        except Exception as error:
            raise TrainingError(
                f"pipeline: {self._name} is on another stage, and what it returns could not be "
                f"found out without its values ({type(error).__name__}: {error}); such a model "
                "needs drivetrain_pipeline.PipelineModule"
            ) from error

    def _run(self, leaves: list[Any], spec: Any, make: Make) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        with _with_tensors(self._module, make), torch.no_grad():
            return self._forward(self._module, *args, **kwargs)


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype
    return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else type(leaf)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor.detach(), device="meta")


def _zeros(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)


@contextmanager
def _with_tensors(module: nn.Module, make: Make) -> Iterator[None]:
    """Let ``make`` make all tensors of ``module`` that are used inside of the block."""
    kept = []
    for part in module.modules():
        dropped = {name: vars(part)[name] for name in vars(part).get(_DROPPED, ())}
        kept.append((part, part._parameters, part._buffers, dropped))
        part._parameters = {n: _parameter(p, make) for n, p in part._parameters.items()}
        part._buffers = {n: None if b is None else make(b) for n, b in part._buffers.items()}
        vars(part).update({name: make(tensor) for name, tensor in dropped.items()})
    try:
        yield
    finally:
        for part, parameters, buffers, dropped in kept:
            part._parameters, part._buffers = parameters, buffers
            vars(part).update(dropped)


def _parameter(parameter: nn.Parameter | None, make: Make) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(make(parameter), requires_grad=False)
