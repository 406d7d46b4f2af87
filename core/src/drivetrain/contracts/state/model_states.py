"""Who owns the parameters, gradients and optimizer states of an engine: the interface.

Core's :class:`~drivetrain.states.replicated.ReplicatedStates` keeps everything on every rank; a
sharding plugin brings its own. The engine only ever talks to this interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    import torch
    from torch import nn

    from drivetrain.contracts.state.fragment import Fragment
    from drivetrain.contracts.world.axis import Axis


class ModelStates(ABC):
    """Parameters, gradients and optimizer states of one engine.

    An *accumulation window* is all that happens between two updates. One window, on every rank:

    1. before each backward, :meth:`begin_backward`; with each loss, the engine sets
       :attr:`weighted`;
    2. gradients arrive through autograd hooks, or :meth:`gradients_ready`; reduction starts as
       buckets fill and overlaps with the rest of backward;
    3. when a backward ends, :meth:`end_backward`;
    4. :meth:`finish_reduction`; then any of :meth:`gradient_norm`, :meth:`first_nonfinite`;
    5. :meth:`update`, or :meth:`discard_gradients` to drop the window.
    """

    @abstractmethod
    def begin_backward(self, *, last: bool, local: bool) -> None:
        """Gradients that arrive from now on are those of another backward; not collective.

        A window begins as if told ``last=False``, so gradients that come unannounced are reduced
        by :meth:`finish_reduction`.

        Args:
            last: no other follows in this window, so what arrives may be reduced at once, and what
                does not arrive counts as zero, but for parameters that are deferred.
            local: nothing may be communicated in this backward (inside ``no_sync``).
        """

    weighted: bool | None = None
    """Whether the losses of this window have weights; ``None`` before the first loss.

    The engine sets it with each loss, and a new window begins with ``None``. Ranks agree on it
    where reduction ends; ``TrainingError`` on all of them if some have weights and others not.
    """

    @abstractmethod
    def gradients_ready(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the ``.grad`` of parameters whose gradient did not come through autograd hooks."""

    @abstractmethod
    def defer(self, parameters: Iterable[nn.Parameter]) -> None:
        """Ignore autograd hooks of ``parameters`` until :meth:`gradients_ready` names them."""

    def added(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """What was added up of a deferred parameter's gradient, which a product may be added to.

        For products that add to a matrix in place, which saves a tensor and two ways through
        memory. Whoever has done so still calls :meth:`gradients_ready`. ``None`` where nothing is
        there yet, or what is there has been sent or is not the gradient alone.
        """
        return None

    @abstractmethod
    def take_set_gradients(self, *, unscaled: bool) -> None:
        """Take what a script has assigned to ``.grad``; called in each micro-batch, at its end.

        Args:
            unscaled: refuse it, since it does not have the loss scale that other gradients have.
        """

    @abstractmethod
    def end_backward(self) -> None:
        """A backward pass is over: start reducing what nothing will be added to."""

    @abstractmethod
    def finish_reduction(self) -> None:
        """Return once every gradient of the window is reduced, late arrivals included."""

    @abstractmethod
    def complete_gradients(self) -> float | None:
        """Reduce what the window holds after its last backward, and leave it open. Collective.

        Returns:
            What gradient fragments are multiplied by to be sums over ranks; ``None`` when no rank
            has a gradient yet, or the update rule reduces them by itself.
        """

    @abstractmethod
    def gradient_norm(self) -> torch.Tensor:
        """Global L2 norm of the reduced, unscaled sums of gradients, a 0-d float64 tensor.

        Every parameter counts once, whatever its sharding. Collective when not all parameters
        are reduced over the whole world. Not finite exactly when some gradient is not.
        """

    @abstractmethod
    def first_nonfinite(self) -> str:
        """Name of the first parameter whose gradient is not finite, with what and how many."""

    def why_not_finite(self, loss: torch.Tensor) -> str:
        """What to add to the message that ``loss`` is no number; mostly nothing."""
        return ""

    @abstractmethod
    def update(self, scale: float | torch.Tensor) -> None:
        """Update every bucket with ``gradient * scale``, publish, and begin a new window."""

    @abstractmethod
    def discard_gradients(self) -> None:
        """Begin a new window without an update."""

    @abstractmethod
    def refresh(self) -> None:
        """Take over parameter values that were written from outside (masters follow)."""

    @abstractmethod
    def take_over(
        self, parameters: Iterable[nn.Parameter], same: Iterable[nn.Parameter] = ()
    ) -> None:
        """Keep values that were written to parameters, alike on all ranks; masters follow.

        Args:
            parameters: those with other values; what the states do not keep is left alone.
            same: those that were written to, perhaps, but have the values that they had.
        """

    @abstractmethod
    def fragments_written(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Make the module's parameters agree with fragments that were written.

        Args:
            parameters: whose fragments they are. The call is collective over the ranks that share
                these, and no others come to it. ``None``: any, and all ranks call.
        """

    @abstractmethod
    def steps(self) -> Mapping[str, int]:
        """Name of every trained parameter of the module -> updates that its states have seen."""

    @abstractmethod
    def rebuild(self, steps: Mapping[str, int] | None = None) -> None:
        """Adapt to parameters that were frozen or unfrozen since; keeps states that remain.

        Args:
            steps: updates that states have seen, by name, where that is not what it was.
        """

    def flush(self) -> None:  # noqa: B027 - most keep nothing under way
        """Finish what is under way, so that fragments show a consistent state to be saved."""

    @abstractmethod
    def fragments(self) -> Sequence[Fragment]:
        """Every parameter, master and optimizer state of this rank; gradients inside a window."""

    def learned(self) -> Sequence[str]:
        """What the windows so far have taught that decides in which order gradients are summed.

        Saved with each rank's state; :meth:`learn` has a resumed run compute the same bits.
        """
        return ()

    def learn(self, learned: Sequence[str]) -> None:  # noqa: B027 - most learn nothing
        """Go on with what :meth:`learned` returned, in the same layout, and forget all else."""

    @abstractmethod
    def detach(self) -> None:
        """Remove every hook from the module; the parameters keep their values."""


GradientWatch = Callable[[nn.Parameter, torch.Tensor], None]
"""Shown what this rank adds to a reduction; see the hook ``watch_gradients``."""

GradientFilter = Callable[[nn.Parameter, torch.Tensor], torch.Tensor]
"""Given each gradient as it arrives; see the hook ``receive_gradients``."""


class GradientNorm(Protocol):
    """The L2 norm of gradients that lie on several ranks; see the hook ``build_gradient_norm``."""

    def __call__(
        self, counted: Mapping[int, Sequence[torch.Tensor]], over: Axis | None
    ) -> torch.Tensor:
        """Return the norm, a 0-d tensor, not finite exactly when some element is not.

        Args:
            counted: how often elements count -> flat tensors of this rank.
            over: axis whose ranks have other elements, to be added up over; ``None`` where this
                rank has all of them. Collective over it.
        """
