"""What stands for the states of an engine while some of their memory is away: it refuses a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from drivetrain.errors import TrainingError
from drivetrain_offload.host.locked import is_locked
from drivetrain_offload.on_demand.storages import fill_again, move_to_host

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from drivetrain.contracts import Fragment
    from drivetrain.engine.engine import Engine
    from drivetrain_offload.on_demand.storages import PlacedStorage

_NOTHING, _GRADIENTS, _PARAMETERS, _ALL = "nothing", "lp_grads", "lp_params", "all"

_NEEDS = {
    "steps": (_NOTHING, ""),
    "learned": (_NOTHING, ""),
    "learn": (_NOTHING, ""),
    "why_not_finite": (_NOTHING, ""),
    "gradients_ready": (_GRADIENTS, "taking gradients"),
    "defer": (_GRADIENTS, "a backward pass"),
    "end_backward": (_GRADIENTS, "a backward pass"),
    "take_set_gradients": (_GRADIENTS, "step()"),
    "complete_gradients": (_GRADIENTS, "reading gradients"),
    "gradient_norm": (_GRADIENTS, "the gradient norm"),
    "first_nonfinite": (_GRADIENTS, "a look at gradients"),
    "discard_gradients": (_GRADIENTS, "zero_grad()"),
    "finish_reduction": (_ALL, "step()"),
    "update": (_ALL, "step()"),
    "refresh": (_ALL, "refreshing master weights"),
    "take_over": (_ALL, "changing parameters"),
    "fragments_written": (_ALL, "loading a checkpoint"),
}
"""Method of ``ModelStates`` -> what it needs, and what its refusal calls it; others need all."""


class SuspendedStates:
    """Stands in ``engine.states`` while some of their memory is away.

    :meth:`__getattr__` is the gate: a method whose states are there is that of the states
    themselves, and any other is refused. So an engine can generate without optimizer states,
    masters and gradients. Fragments show what is away where it is.

    Args:
        engine: whose states; they are not changed before :meth:`move_away`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.inner = engine.states
        self.away: list[PlacedStorage] = []
        self.inner.flush()
        # Views of memory cannot be made while it is away, so that these are made before.
        self._fragments = list(self.inner.fragments())
        self._guard: _ParameterGuard | None = None

    # -- moving -------------------------------------------------------------------------------

    def live_fragments(self) -> list[Fragment]:
        """Fragments that are not away."""
        away = self._on_host()
        return [fragment for fragment in self._fragments if id(fragment) not in away]

    def move_away(
        self, storages: Sequence[PlacedStorage], *, pin_memory: bool, non_blocking: bool
    ) -> None:
        """Copy ``storages`` to host memory and give theirs back.

        Raises:
            TrainingError: there is too little host memory. Nothing is moved then.
        """
        accelerator = self.engine.job.accelerator
        move_to_host(storages, accelerator, pin_memory=pin_memory, non_blocking=non_blocking)
        self.away += storages
        if any(_PARAMETERS in storage.kinds for storage in storages):
            self._guard = self._guard or _ParameterGuard(self)
            self._guard.hide({storage.storage._cdata for storage in storages})

    def bring_back(self, *, non_blocking: bool, kinds: set[str] | None = None) -> None:
        """Fill the memory of what is away again, of some kinds or all.

        Raises:
            TrainingError: the device has too little memory. What is away then stays away.
        """
        coming = [s for s in self.away if kinds is None or s.kinds & kinds]
        fill_again(coming, self.engine.job.accelerator, non_blocking=non_blocking)
        self.away = [storage for storage in self.away if storage.host is not None]
        if self._guard is not None and not self._is_away(_PARAMETERS):
            self._guard.remove()
            self._guard = None

    def locked_bytes(self) -> dict[str, int]:
        """Kind of fragment -> bytes of it that are away in page-locked memory."""
        found: dict[str, int] = defaultdict(int)
        for storage in self.away:
            if storage.host is not None and is_locked(storage.host):
                for fragment, view in storage.fragments:
                    found[fragment.kind] += view.nbytes
        return dict(found)

    # -- the gate -----------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        needed, what = _NEEDS.get(name, (_ALL, f"{name}()"))
        if self._is_away(needed):
            self.refuse(what)
        return getattr(self.inner, name)

    def _is_away(self, kind: str) -> bool:
        return any(kind == _ALL or kind in storage.kinds for storage in self.away)

    def refuse(self, what: str, *_: object) -> NoReturn:
        """Say that ``what`` needs states that are away.

        Raises:
            TrainingError: always.
        """
        kinds = ", ".join(sorted({kind for storage in self.away for kind in storage.kinds}))
        raise TrainingError(
            f"{what} needs model states that are away: offload_states() has moved {kinds} to host "
            "memory; call reload_states(engine) first"
        )

    # -- what works meanwhile, or depends on more than the method -----------------------------

    @property
    def weighted(self) -> bool | None:
        """See :class:`~drivetrain.contracts.ModelStates`."""
        return self.inner.weighted

    @weighted.setter
    def weighted(self, value: bool | None) -> None:
        self.inner.weighted = value

    def begin_backward(self, *, last: bool, local: bool) -> None:
        away = self._is_away(_PARAMETERS) or self._is_away(_GRADIENTS)
        states = self.refuse("a backward pass") if away else self.inner
        states.begin_backward(last=last, local=local)

    def flush(self) -> None:
        """Return at once: nothing was begun since the states were flushed and moved."""

    def fragments(self) -> Sequence[Fragment]:
        """See :class:`~drivetrain.contracts.ModelStates`; what is away is read on the host."""
        away, write = self._on_host(), partial(self.refuse, "writing states")
        return [replace(away.get(id(f), f), write=write) for f in self._fragments]

    def _on_host(self) -> dict[int, Fragment]:
        """``id`` of a fragment that is away -> the same fragment where it is now."""
        return {
            id(fragment): _fragment_on_host(fragment, storage.on_host(view))
            for storage in self.away
            for fragment, view in storage.fragments
        }

    def detach(self) -> None:
        """The client's parameters keep their values; other states need not come back."""
        self.bring_back(non_blocking=False, kinds={_PARAMETERS})
        self.inner.detach()


def suspended(engine: Engine) -> SuspendedStates | None:
    """What stands for the states of ``engine``; None if nothing is away."""
    states: object = engine.states
    return states if isinstance(states, SuspendedStates) else None


class _ParameterGuard:
    """Refuses every use of parameters whose memory is away, by whatever way.

    Kernels would follow a null pointer. Until the memory is back, parameters read as NaN (integers
    as 0), and modules, ``state_dict`` and ``whole`` refuse.
    """

    def __init__(self, states: SuspendedStates) -> None:
        self._states = states
        self._shown: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._handles: list[tuple[nn.Parameter, object]] = []
        self._hooks: list[RemovableHandle] = []
        forward = partial(states.refuse, "a forward pass")
        state_dict = partial(states.refuse, "state_dict()")
        module = states.engine.module
        for parameter in module.parameters():
            self._handles.append((parameter, vars(parameter).get("drivetrain_handle")))
            parameter.drivetrain_handle = self  # type: ignore[attr-defined]
        for part in module.modules():
            if part is module or part._parameters:
                before_dict: Any = part.register_state_dict_pre_hook
                self._hooks.append(part.register_forward_pre_hook(forward, prepend=True))
                self._hooks.append(before_dict(state_dict))

    def gather(self, write_rank: int | None) -> None:
        """See :class:`~drivetrain.contracts.ParameterHandle`."""
        self._states.refuse("using parameters whole")

    def release(self, write_rank: int | None) -> None:
        """See :class:`~drivetrain.contracts.ParameterHandle`."""

    def hide(self, storages: set[int]) -> None:
        """Let parameters in ``storages``, which are empty now, show no memory."""
        for parameter in self._states.engine.module.parameters():
            values = parameter.data
            if values.untyped_storage()._cdata in storages:
                self._shown.append((parameter, values))
                number = float("nan") if values.is_floating_point() else 0
                one = torch.full((), number, dtype=values.dtype, device=values.device)
                parameter.data = one.expand(values.shape)

    def remove(self) -> None:
        """Let parameters be used again; their memory is back."""
        for hook in self._hooks:
            hook.remove()
        for parameter, handle in self._handles:
            if handle is None:
                vars(parameter).pop("drivetrain_handle")
            else:
                parameter.drivetrain_handle = handle  # type: ignore[attr-defined]
        for parameter, values in self._shown:
            parameter.data = values


def _fragment_on_host(fragment: Fragment, values: torch.Tensor) -> Fragment:
    return replace(fragment, home="host", read=lambda: values)
