"""Terms of the loss that layers add in their forward, and values that they report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.contracts.world.collective import Purpose, Tag
from drivetrain.errors import TrainingError

if TYPE_CHECKING:
    from drivetrain.contracts.world.axis import Axis
    from drivetrain.contracts.world.communicator import Communicator

Factor = float | torch.Tensor
"""A number, where the host knows it, else a 0-d tensor."""

Note = Callable[[torch.Tensor], None]
"""Takes a term times the weight of its loss, 0-d, once per backward through it."""


class ExtraLosses:
    """Adds terms to losses in backward, where a loss is scaled and weighted as its terms are.

    A term rides on a tensor of the layer: whatever backward comes through the tensor, from a loss
    or from the next stage of a pipeline, in whatever order micro-batches come, adds the gradient of
    the term. So it belongs to the micro-batch of that tensor, and a forward without backward
    leaves nothing behind.
    """

    def __init__(self) -> None:
        self.used = False
        self.lacks_weight = False
        """Whether a backward of this window that was told no weight has come through a term."""
        self._scale: Callable[[], float] = lambda: 1.0
        self._weight: Factor | None = None
        self._note: Note | None = None

    def add(self, through: torch.Tensor, value: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """Add ``weight * value`` to the loss of this micro-batch; returns ``through``.

        Args:
            through: a floating-point tensor of the layer that the loss depends on. The layer goes
                on with what is returned; without that, the term takes no part.
            value: a scalar, the mean over what this rank has, as a loss is; with a graph, or it
                has no effect.
            weight: of the term in the loss.

        Raises:
            TrainingError: ``value`` is no scalar.
        """
        if value.numel() != 1:
            raise TrainingError(
                f"an extra loss is a scalar, got shape {tuple(value.shape)}; reduce it"
            )
        if not (weight and torch.is_grad_enabled() and value.requires_grad):
            return through
        self.used = True
        apply: Any = _Term.apply  # torch does not type it
        carried: torch.Tensor = apply(through, value.reshape(()), weight, self)
        return carried

    def begin(
        self, scale: Callable[[], float], weight: Factor | None, note: Note | None = None
    ) -> None:
        """Tell what the loss of the backward that comes next is multiplied by.

        Args:
            scale: returns the loss scale.
            weight: the weight of the loss; ``None`` without.
            note: takes terms, for the loss that is reported.
        """
        self._scale, self._weight, self._note = scale, weight, note

    def _gradient(self, value: torch.Tensor, weight: float, *, counted: bool) -> torch.Tensor:
        """The gradient of a term; notes its value unless it is ``counted`` already."""
        factor = weight if self._weight is None else weight * self._weight
        self.lacks_weight |= self._weight is None
        if self._note is not None and not counted:
            self._note(value * factor)
        return torch.ones_like(value) * (self._scale() * factor)


class _Term(torch.autograd.Function):
    """The identity; in backward it gives a gradient to the term that it carries."""

    @staticmethod
    def forward(
        ctx: Any, through: torch.Tensor, value: torch.Tensor, weight: float, losses: ExtraLosses
    ) -> torch.Tensor:
        ctx.value, ctx.weight, ctx.losses, ctx.counted = value.detach(), weight, losses, False
        return through.view_as(through)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        found = ctx.losses._gradient(ctx.value, ctx.weight, counted=ctx.counted)
        ctx.counted = True  # a schedule may come for inputs first, and for weights later
        return gradient, found, None, None


class ReportValues:
    """Numbers that layers tell of a step; the report has their means.

    Names are declared before an engine is built and agreed on there, so that ranks which add
    nothing, such as other stages of a pipeline, take part in the sum.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._agreed: dict[str, int] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def declare(self, name: str, size: int = 1) -> None:
        """Make a name known, of ``size`` numbers, in a transform of the module.

        Raises:
            TrainingError: it is declared with another size.
        """
        if self._sizes.setdefault(name, size) != size:
            raise TrainingError(
                f"report value {name!r} has {self._sizes[name]} numbers, so it cannot have {size}"
            )

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add one micro-batch's value, [size] or 0-d; a forward that is repeated adds nothing.

        Raises:
            TrainingError: the name was not declared before the engine was built, or with another
                size.
        """
        if torch._C._current_graph_task_id() != -1:
            return
        if self._agreed.get(name) != value.numel():
            raise TrainingError(
                f"report value {name!r} of {value.numel()} numbers is not known: declare it with "
                "job.values.declare in a transform of the module"
            )
        value = value.detach().reshape(-1)
        held = self._sums.get(name)
        self._sums[name] = value.clone() if held is None else held + value
        self._counts[name] = self._counts.get(name, 0) + 1

    def agree(self, communicator: Communicator | None, device: torch.device) -> None:
        """Make the names of all ranks known to all. Collective over the world.

        Args:
            communicator: of the job; ``None`` where ranks cannot talk.
            device: of the job.
        """
        if communicator is not None:
            self._learn_others(communicator, device)
        self._agreed = dict(sorted(self._sizes.items()))

    def _learn_others(self, communicator: Communicator, device: torch.device) -> None:
        text = json.dumps(self._sizes).encode()
        tag = Tag(Purpose.CONTROL, site="names of report values")
        size = communicator.size("world")
        lengths = torch.empty(size, dtype=torch.int64, device=device)
        own = torch.tensor([len(text)], device=device)
        communicator.all_gather(lengths, own, "world", tag)
        longest = int(lengths.max())
        padded = torch.tensor(list(text.ljust(longest)), dtype=torch.uint8, device=device)
        texts = torch.empty(size * longest, dtype=torch.uint8, device=device)
        communicator.all_gather(texts, padded, "world", tag)
        for row in texts.view(size, longest).cpu():
            for name, numbers in json.loads(bytes(row.tolist())).items():
                self.declare(name, numbers)

    def take(
        self, communicator: Communicator, axis: Axis | None, device: torch.device
    ) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return sums and counts since the last call, by name; begin again.

        Args:
            communicator: of the job.
            axis: summed over, a collective; ``None`` for what this rank has.
            device: of the job.
        """
        sums, self._sums, counts, self._counts = self._sums, {}, self._counts, {}
        if not self._agreed or (axis is None and not counts):
            return {}
        parts = [
            sums[name].to(torch.float32) if name in sums else torch.zeros(size, device=device)
            for name, size in self._agreed.items()
        ]
        numbers = [float(counts.get(name, 0)) for name in self._agreed]
        flat = torch.cat([*parts, torch.tensor(numbers, device=device)])
        if axis is not None:
            communicator.all_reduce(flat, axis, Tag(Purpose.CONTROL, site="report values"))
        *totals, times = torch.split(flat, [*self._agreed.values(), len(numbers)])
        return dict(zip(self._agreed, zip(totals, times, strict=True), strict=True))
