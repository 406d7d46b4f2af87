"""Model states of which some are away, in host memory: what then works, and what is refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import nn

from drivetrain.contracts import ModelStates
from drivetrain.errors import TrainingError
from drivetrain_offload.host.locked import is_locked, lock

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from drivetrain.contracts import Fragment
    from drivetrain.engine.engine import Engine
    from drivetrain_offload.on_demand.storages import PlacedStorage

_PARAMETERS, _GRADIENTS = "lp_params", "lp_grads"


class SuspendedStates(ModelStates):
    """Stands before the states of an engine while some of their memory is away.

    What needs only memory that is there goes on as ever: an engine can generate without optimizer
    states, masters and gradients. Fragments show what is away where it is.

    Args:
        engine: whose states; they are not changed before :meth:`move_away`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.inner = engine.states
        self.away: list[PlacedStorage] = []
        # Views of memory cannot be made while it is away, so that these are made before.
        self._fragments = list(self.inner.fragments())
        self._on_host: dict[int, Fragment] = {}
        self._guard: _ParameterGuard | None = None

    # -- moving -------------------------------------------------------------------------------

    def live_fragments(self) -> list[Fragment]:
        """Fragments that are not away."""
        return [f for f in self._fragments if id(f) not in self._on_host]

    def move_away(
        self, storages: Sequence[PlacedStorage], *, pin_memory: bool, non_blocking: bool
    ) -> None:
        """Copy ``storages`` to host memory and give theirs back.

        Raises:
            TrainingError: there is too little host memory. Nothing is moved then.
        """
        for done, storage in enumerate(storages):
            try:
                storage.host = self._host_memory(storage.nbytes, pin_memory)
            except (RuntimeError, MemoryError) as error:
                for other in storages[:done]:
                    other.host = None
                locked = "pinned " if pin_memory else ""
                hint = "pin_memory=False, or " if pin_memory else ""
                raise TrainingError(
                    f"no {locked}host memory for {sum(s.nbytes for s in storages)} bytes of model "
                    f"states ({' '.join(str(error).split())}); {hint}move fewer kinds"
                ) from error
        for storage in storages:
            assert storage.host is not None
            storage.host.copy_(storage.bytes(), non_blocking=non_blocking)
        self.engine.job.accelerator.synchronize()
        if any(_PARAMETERS in storage.kinds for storage in storages):
            self._guard_parameters(storages)
        for storage in storages:
            for fragment, view in storage.fragments:
                self._on_host[id(fragment)] = _on_host(fragment, storage.on_host(view))
            storage.storage.resize_(0)
        self.away += storages

    def _host_memory(self, nbytes: int, pin_memory: bool) -> torch.Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8)
        return lock(self.engine.job.accelerator, memory) if pin_memory else memory

    def locked_bytes(self) -> dict[str, int]:
        """Kind of fragment -> bytes of it that are away in page-locked memory."""
        found: dict[str, int] = defaultdict(int)
        for storage in self.away:
            if storage.host is not None and is_locked(storage.host):
                for fragment, view in storage.fragments:
                    found[fragment.kind] += view.nbytes
        return dict(found)

    def _guard_parameters(self, storages: Sequence[PlacedStorage]) -> None:
        if self._guard is None:
            self._guard = _ParameterGuard(self)
        self._guard.hide({storage.storage._cdata for storage in storages})

    def bring_back(self, *, non_blocking: bool, kinds: set[str] | None = None) -> None:
        """Fill the memory of what is away again, of some kinds or all.

        Raises:
            TrainingError: the device has too little memory. What is away then stays away.
        """
        coming = [s for s in self.away if kinds is None or s.kinds & kinds]
        for done, storage in enumerate(coming):
            try:
                storage.storage.resize_(storage.nbytes)
            except RuntimeError as error:
                for other in coming[:done]:
                    other.storage.resize_(0)
                raise TrainingError(
                    f"{self.engine.device} has no memory for {sum(s.nbytes for s in coming)} bytes "
                    f"of model states that come back ({' '.join(str(error).split())}); free what "
                    "the phase in between has left there"
                ) from error
        for storage in coming:
            assert storage.host is not None
            storage.bytes().copy_(storage.host, non_blocking=non_blocking)
            for fragment, _ in storage.fragments:
                self._on_host.pop(id(fragment), None)
        if not non_blocking:
            self.engine.job.accelerator.synchronize()
        for storage in coming:
            storage.host = None
        self.away = [storage for storage in self.away if storage.host is not None]
        if self._guard is not None and not self._is_away(_PARAMETERS):
            self._guard.remove()
            self._guard = None

    # -- refusing -----------------------------------------------------------------------------

    def _is_away(self, kind: str) -> bool:
        return any(kind in storage.kinds for storage in self.away)

    def refuse(self, what: str) -> NoReturn:
        """Say that ``what`` needs states that are away.

        Raises:
            TrainingError: always.
        """
        kinds = ", ".join(sorted({kind for storage in self.away for kind in storage.kinds}))
        raise TrainingError(
            f"{what} needs model states that are away: offload_states() has moved {kinds} to host "
            "memory; call reload_states(engine) first"
        )

    def _whole(self, what: str) -> ModelStates:
        """The states, for something that may use all of them."""
        return self.refuse(what) if self.away else self.inner

    def _with_gradients(self, what: str) -> ModelStates:
        return self.refuse(what) if self._is_away(_GRADIENTS) else self.inner

    # -- passes -------------------------------------------------------------------------------

    @property
    def reduce_now(self) -> bool:
        """See :class:`~drivetrain.contracts.ModelStates`."""
        return self.inner.reduce_now

    @reduce_now.setter
    def reduce_now(self, value: bool) -> None:
        self.inner.reduce_now = value

    @property
    def local(self) -> bool:
        """See :class:`~drivetrain.contracts.ModelStates`; set whenever a pass begins."""
        return self.inner.local

    @local.setter
    def local(self, value: bool) -> None:
        if self._is_away(_PARAMETERS):
            self.refuse("a forward or backward pass")
        if torch.is_grad_enabled() and self._is_away(_GRADIENTS):
            self.refuse("a pass that makes gradients (use torch.no_grad() where none are wanted)")
        self.inner.local = value

    def gradients_ready(self, parameters: Iterable[nn.Parameter]) -> None:
        self._with_gradients("taking gradients").gradients_ready(parameters)

    def defer(self, parameters: Iterable[nn.Parameter]) -> None:
        self._with_gradients("a backward pass").defer(parameters)

    def take_set_gradients(self, *, unscaled: bool) -> None:
        self._with_gradients("step()").take_set_gradients(unscaled=unscaled)

    def end_backward(self) -> None:
        self._with_gradients("a backward pass").end_backward()

    # -- the end of a window ------------------------------------------------------------------

    def finish_reduction(self) -> None:
        self._whole("step()").finish_reduction()

    def complete_gradients(self) -> float | None:
        return self._with_gradients("reading gradients").complete_gradients()

    def gradient_norm(self) -> torch.Tensor:
        return self._with_gradients("the gradient norm").gradient_norm()

    def first_nonfinite(self) -> str:
        return self._with_gradients("a look at gradients").first_nonfinite()

    def update(self, scale: float | torch.Tensor) -> None:
        self._whole("step()").update(scale)

    def discard_gradients(self) -> None:
        self._with_gradients("zero_grad()").discard_gradients()

    # -- from outside -------------------------------------------------------------------------

    def refresh(self) -> None:
        self._whole("refreshing master weights").refresh()

    def take_over(
        self, parameters: Iterable[nn.Parameter], same: Iterable[nn.Parameter] = ()
    ) -> None:
        self._whole("changing parameters").take_over(parameters, same)

    def fragments_written(self) -> None:
        self._whole("loading a checkpoint").fragments_written()

    def steps(self) -> Mapping[str, int]:
        return self.inner.steps()

    def rebuild(self, steps: Mapping[str, int] | None = None) -> None:
        self._whole("rebuild()").rebuild(steps)

    def flush(self) -> None:
        pass  # nothing was begun since the states were flushed and moved

    def fragments(self) -> Sequence[Fragment]:
        def refuse(_values: torch.Tensor) -> None:
            self.refuse("writing states")

        return [replace(self._on_host.get(id(f), f), write=refuse) for f in self._fragments]

    def learned(self) -> Sequence[str]:
        return self.inner.learned()

    def learn(self, learned: Sequence[str]) -> None:
        self.inner.learn(learned)

    def detach(self) -> None:
        """The client's parameters keep their values; other states need not come back."""
        self.bring_back(non_blocking=False, kinds={_PARAMETERS})
        self.inner.detach()


class _ParameterGuard:
    """Keeps everybody from using parameters whose memory is away.

    Kernels would follow a null pointer. Until the memory is back, parameters show one number that
    is not one, and modules, ``state_dict`` and ``whole`` refuse.
    """

    def __init__(self, states: SuspendedStates) -> None:
        self._states = states
        self._shown: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._handles: list[tuple[nn.Parameter, object]] = []
        self._hooks: list[RemovableHandle] = []
        module = states.engine.module
        for parameter in module.parameters():
            self._handles.append((parameter, vars(parameter).get("drivetrain_handle")))
            parameter.drivetrain_handle = self  # type: ignore[attr-defined]
        for part in module.modules():
            if part is module or part._parameters:
                self._guard_module(part)

    def _guard_module(self, part: nn.Module) -> None:
        def forward(_module: nn.Module, _inputs: object) -> None:
            self._states.refuse("a forward pass")

        def state_dict(_module: nn.Module, _prefix: str, _keep_vars: bool) -> None:
            self._states.refuse("state_dict()")

        register = part.register_state_dict_pre_hook
        self._hooks.append(part.register_forward_pre_hook(forward, prepend=True))
        self._hooks.append(register(state_dict))  # type: ignore[no-untyped-call]

    def gather(self, write_rank: int | None) -> None:
        """See :class:`~drivetrain.contracts.ParameterHandle`."""
        self._states.refuse("using parameters whole")

    def release(self, write_rank: int | None) -> None:
        """See :class:`~drivetrain.contracts.ParameterHandle`."""

    def hide(self, storages: set[int]) -> None:
        """Let parameters in ``storages``, which are about to be emptied, show no memory."""
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


def _on_host(fragment: Fragment, values: torch.Tensor) -> Fragment:
    """The same fragment where it is now."""
    return replace(fragment, home="host", read=lambda: values)
