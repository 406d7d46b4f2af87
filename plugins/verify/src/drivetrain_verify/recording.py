"""What a module was given in each micro-batch, and the gradients that came back for its outputs.

Beside it the first parameter that had another value, when the module used it, than the weights that
the window began with: of a unit that is gathered too early, say, whose error reaches the gradients
of all parameters before it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from drivetrain.contracts import Op, Purpose, Tag

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from drivetrain.job.job import Job


ROUNDINGS = 4.0
"""A weight may differ from its master by so many roundings of its own dtype."""


@dataclass(frozen=True)
class Used:
    """A parameter whose value was another one than it should have been.

    Args:
        parameter: its name.
        error: norm of the difference.
        bound: what rounding to its dtype explains.
        scale: norm of what it should have been.
    """

    parameter: str
    error: float
    bound: float
    scale: float


@dataclass
class MicroBatch:
    """One forward of a module that trains.

    Args:
        args: positional arguments, on the host.
        kwargs: the rest of them.
        random: state of the generator that dropout drew from, before it did.
        outputs: each tensor among the outputs, on the host.
        gradients: of each of them, of the scaled loss; ``None`` without one.
        wrong: the first parameter that was used with a wrong value.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: torch.Tensor
    outputs: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    wrong: Used | None = None

    @property
    def has_gradients(self) -> bool:
        """Whether a backward came through it."""
        return any(gradient is not None for gradient in self.gradients)


class Recorder:
    """Keeps the micro-batches of a window.

    Args:
        device: whose default generator dropout draws from.
    """

    def __init__(self, device: torch.device) -> None:
        self.micro_batches: list[MicroBatch] = []
        self._device = device
        self._hooks: list[RemovableHandle] = []
        self._weights: Mapping[str, torch.Tensor] = {}
        self._name_of: Callable[[nn.Parameter], str] | None = None

    def expect(
        self, weights: Mapping[str, torch.Tensor], name_of: Callable[[nn.Parameter], str]
    ) -> None:
        """Say which weights the next window is to use.

        Args:
            weights: name -> whole tensor in the dtype of the parameter, on the host.
            name_of: name of a parameter of the module.
        """
        self._weights, self._name_of = weights, name_of

    def follow(self, module: nn.Module) -> nn.Module:
        """Record what ``module`` does from now on."""
        before: Any = self._before
        after: Any = self._after
        self._hooks = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]
        for part in module.modules():
            if part._parameters:
                self._hooks.append(part.register_forward_pre_hook(self._use))
        return module

    def stop(self) -> None:
        """Record nothing more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.micro_batches.clear()
        self._weights = {}

    def take(self) -> list[MicroBatch]:
        """The window's micro-batches that had a backward; the next ones begin another window."""
        taken = [one for one in self.micro_batches if one.has_gradients]
        self.micro_batches = []
        return taken

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            args, kwargs = pytree.tree_map(_kept, (args, kwargs))
            self.micro_batches.append(MicroBatch(args, kwargs, _random_state(self._device)))

    def _use(self, part: nn.Module, _args: object) -> None:
        """Compare the parameters that a part is about to use."""
        if not (part.training and torch.is_grad_enabled() and self.micro_batches):
            return
        record = self.micro_batches[-1]
        for parameter in part.parameters(recurse=False):
            if record.wrong is not None or self._name_of is None:
                return
            name = self._name_of(parameter)
            expected = self._weights.get(name)
            if expected is None or expected.shape != parameter.shape:
                continue  # frozen, or this rank has no more than a part of it
            wide = expected.double()
            scale = float(wide.norm())
            bound = ROUNDINGS * torch.finfo(parameter.dtype).eps * scale
            error = float((parameter.detach().cpu().double() - wide).norm())
            if not error <= bound:
                record.wrong = Used(name, error, bound, scale)

    def _after(self, module: nn.Module, _args: object, outputs: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        record = self.micro_batches[-1]
        tensors = output_tensors(outputs)
        record.outputs = [_kept(tensor) for tensor in tensors]
        record.gradients = [None] * len(tensors)
        for index, tensor in enumerate(tensors):
            if tensor.requires_grad:
                hooked: Any = tensor  # torch does not type the method
                hooked.register_hook(
                    lambda gradient, index=index: _add(record.gradients, index, gradient)
                )


def output_tensors(outputs: Any) -> list[torch.Tensor]:
    """Floating tensors among a module's outputs, in a fixed order."""
    leaves = pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def gathered(job: Job, own: list[MicroBatch]) -> list[list[MicroBatch]]:
    """The micro-batches of each rank, in order of ranks. Collective over the world."""
    buffer = io.BytesIO()
    torch.save(own, buffer)
    data = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    size, tag = job.mesh.size("world"), Tag(Purpose.CONTROL, site="micro-batches to verify")
    lengths = torch.zeros(size, dtype=torch.int64, device=job.device)
    lengths[job.rank] = data.numel()
    job.communicator.all_reduce(lengths, "world", tag, op=Op.MAX)
    longest = int(lengths.max())
    mine = torch.zeros(longest, dtype=torch.uint8, device=job.device)
    mine[: data.numel()] = data.to(job.device)
    everything = torch.zeros(longest * size, dtype=torch.uint8, device=job.device)
    job.communicator.all_gather(everything, mine, "world", tag)
    return [
        # what another rank of this job has saved a moment ago, classes of the client's included
        torch.load(io.BytesIO(part[: int(length)].numpy().tobytes()), weights_only=False)
        for part, length in zip(everything.cpu().view(size, longest), lengths, strict=True)
    ]


def _add(into: list[torch.Tensor | None], index: int, gradient: torch.Tensor) -> None:
    kept, before = gradient.detach().cpu().clone(), into[index]
    into[index] = kept if before is None else before + kept


def _kept(leaf: Any) -> Any:
    return leaf.detach().cpu().clone() if isinstance(leaf, torch.Tensor) else leaf


def _random_state(device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: torch.Tensor = torch.get_device_module(device.type).get_rng_state(device)
    return state
