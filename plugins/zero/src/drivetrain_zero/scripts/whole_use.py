"""What scripts call to use sharded parameters whole."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from drivetrain.errors import TrainingError
from drivetrain.states.whole import whole, whole_parts
from drivetrain_zero.scripts.copies import Hook

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from drivetrain.engine.engine import Engine

_external: weakref.WeakKeyDictionary[nn.Module, dict[int, RemovableHandle]]
_external = weakref.WeakKeyDictionary()


class OnOneRank:
    """What ``zero.Init`` leaves on a parameter that it does not cut, as there is one rank only.

    Scripts that are written for any number of ranks ask for the parameter before they use it, and
    check that they have to.

    Attributes:
        uses: blocks that have asked for it and are not over.
    """

    def __init__(self) -> None:
        self.uses = 0

    @property
    def gathered(self) -> bool:
        """Whether a script has asked for it."""
        return self.uses > 0


class GatheredParameters:
    """Parameters are whole inside this context; see :func:`drivetrain.states.whole.whole`.

    Collective over the ranks that share the parameters. Ordinary parameters are left alone.

    Args:
        params: a parameter, several, or a module.
        modifier_rank: the data-parallel rank whose changes are kept; ``None`` for reading only.
        fwd_module: module that is going to use the parameters in its forward, besides their own;
            see :func:`register_external_parameter`.
        enabled: ``False`` makes the context do nothing.

    Raises:
        TrainingError: on leaving, a parameter was changed where the change would be lost; on
            entering, it is gathered for writing inside a block that gathers it already.
    """

    def __init__(
        self,
        params: nn.Parameter | Iterable[nn.Parameter] | nn.Module,
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        if isinstance(params, nn.Module):
            params = params.parameters()
        self._parameters = [params] if isinstance(params, nn.Parameter) else list(params)
        self._modifier_rank = modifier_rank
        self._stack = ExitStack()
        self._enabled = enabled
        if enabled and fwd_module is not None:
            for parameter in self._parameters:
                register_external_parameter(fwd_module, parameter)

    def __enter__(self) -> None:
        if not self._enabled:
            return
        self._stack.enter_context(whole(self._parameters, self._modifier_rank))
        for parameter in self._parameters:
            if isinstance(alone := getattr(parameter, "drivetrain_alone", None), OnOneRank):
                alone.uses += 1
                self._stack.callback(setattr, alone, "uses", alone.uses - 1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Tell that ``module``'s forward uses ``parameter``, which another module owns.

    Needed only when the parameter is reached by another way than its module's attribute, such as
    a list that keeps it. May come before the engine exists, and repeatedly.

    Raises:
        TrainingError: the arguments are no module and no parameter.
    """
    given: tuple[object, object] = (module, parameter)
    if not (isinstance(given[0], nn.Module) and isinstance(given[1], nn.Parameter)):
        raise TrainingError(
            "register_external_parameter needs a torch.nn.Module and a torch.nn.Parameter, got "
            f"{type(module).__name__} and {type(parameter).__name__}"
        )
    hooks = _external.setdefault(module, {})
    if id(parameter) in hooks:
        return

    def gather(_module: nn.Module, _args: Any) -> None:
        handle = getattr(parameter, "drivetrain_handle", None)
        use = getattr(handle, "use", None)
        if use is not None:
            use()

    hooks[id(parameter)] = module.register_forward_pre_hook(Hook(gather))


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Undo :func:`register_external_parameter`.

    Raises:
        TrainingError: the parameter is not registered with the module.
    """
    hook = _external.get(module, {}).pop(id(parameter), None)
    if hook is None:
        raise TrainingError(
            f"a parameter of shape {tuple(parameter.shape)} is not registered with this "
            f"{type(module).__name__}"
        )
    hook.remove()


@contextmanager
def unwrap_model_for_generation(engine: Engine) -> Iterator[nn.Module]:
    """The engine's module with all that its forward needs, so that ranks may generate alone.

    Collective on entering and leaving only: inside, data-parallel ranks may run forward different
    numbers of times. Needs memory for all of the module. Tensor-parallel parts stay parts, which is
    what the forward is made for.
    """
    with whole_parts([*engine.module.parameters()]):
        yield engine.module
