"""Refuse what cannot work on sharded parameters, and name one that was read as NaN."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from drivetrain.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from drivetrain.contracts import ParameterTable, UpdateRule
    from drivetrain_zero.gathering.unit_hooks import UnitHooks


_guarded: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def explain(loss: torch.Tensor, hooks: UnitHooks | None, table: ParameterTable) -> str:
    """Return what to add to a message about a loss that is no number.

    Args:
        loss: with its graph.
        hooks: know the forwards of the model, and what was taken out of a module between them.
        table: knows names.
    """
    if hooks is None:
        return ""
    used = next(_used_outside(loss, hooks.forwards), hooks.taken)
    if used is None:
        return ""
    return (
        f"; parameter {table.info(used).name} was read where it is sharded, as NaN: use it in the "
        "forward of the model, or inside `with drivetrain.whole(parameters):` on every rank"
    )


def _used_outside(
    loss: torch.Tensor, forwards: Sequence[tuple[int, int]]
) -> Iterator[nn.Parameter]:
    """Yield sharded parameters that operations outside of the model's forward have used.

    Args:
        loss: whose graph is searched.
        forwards: autograd's numbers of operations at the beginning and the end of each forward.
    """
    nodes = [] if loss.grad_fn is None else [loss.grad_fn]
    known = set(nodes)
    for node in nodes:
        inside = any(first <= node._sequence_nr() < last for first, last in forwards)
        for following, _ in node.next_functions:
            parameter = getattr(following, "variable", None)
            if parameter is not None and not inside and hasattr(parameter, "drivetrain_handle"):
                yield parameter
            if following is not None and following not in known:
                known.add(following)
                nodes.append(following)


def refuse_scripted(module: nn.Module) -> None:
    """Check that all modules can be given hooks.

    Raises:
        ConfigError: one was made by ``torch.jit``.
    """
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ConfigError(
                f"zero_optimization: module {name or 'itself'} was made by torch.jit, so its "
                "parameters cannot be gathered around its forward: use stage 2 or less, give the "
                "engine the module as it was before, or compile it (engine.compile())"
            )


class ElsewhereTensor(torch.Tensor):
    """What ``state_dict()`` has of a sharded parameter: its shape, dtype and device, no values.

    Frameworks look at names and shapes before they decide what to load, and save what they have
    collected by other means. Whatever needs values is refused: computing, copying, pickling.

    Args:
        parameter: sharded.
        name: what messages call it.
    """

    def __new__(cls, parameter: nn.Parameter, name: str) -> ElsewhereTensor:
        made: ElsewhereTensor = torch.Tensor._make_wrapper_subclass(
            cls, parameter.shape, dtype=parameter.dtype, device=parameter.device
        )
        made.parameter_name = name
        return made

    parameter_name: str

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Any,
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        given = tree_leaves((arguments, named))
        raise next(each for each in given if isinstance(each, cls))._refusal()

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise self._refusal()

    # what torch answers without a dispatch
    __deepcopy__ = __reduce_ex__ = numpy = tolist = _refuse
    data_ptr = storage = untyped_storage = _refuse

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"<{self.parameter_name}, sharded, {tuple(self.shape)} of {self.dtype}>"

    def _refusal(self) -> TrainingError:
        return TrainingError(
            f"state_dict() of a module whose parameter {self.parameter_name} is sharded: the "
            "values are not here. Call engine.module_state_dict(), or do it inside "
            "drivetrain.whole(module)"
        )


def mark_released_in_state_dict(module: nn.Module) -> None:
    """Let ``state_dict()`` of ``module`` tell which of its own parameters are released."""
    if module._parameters and module not in _guarded:
        _guarded.add(module)
        module.register_state_dict_post_hook(_mark_released)  # type: ignore[no-untyped-call]


def _mark_released(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: object
) -> None:
    for name, parameter in module._parameters.items():
        handle = getattr(parameter, "drivetrain_handle", None)
        if parameter is not None and not getattr(handle, "gathered", True):
            state_dict[prefix + name] = ElsewhereTensor(parameter, prefix + name)


def refuse_communicating(rule: UpdateRule | None) -> None:
    """Rules that reduce gradients by themselves need whole ones."""
    if rule is not None and rule.communicates:
        raise ConfigError(
            f"zero_optimization: the optimizer {type(rule).__name__} communicates gradients by "
            "itself and needs them whole, so they cannot be sharded; use stage 0, or another "
            "optimizer.type"
        )
