"""Weights of experts in host memory, of which the device has those that were used last.

A model that serves needs few of its experts for a forward of few tokens. Here the weights of a
layer's experts lie in host memory, and the device has room for some. What a forward needs and the
device has not is copied there, in place of what was used longest ago. Experts that are there
compute first; where a forward needs more than there is room for, they take turns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.precision.precision import Precision

if TYPE_CHECKING:
    from drivetrain.job.job import Job

Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
MARK = "drivetrain_expert_cache"
"""Attribute of modules whose own weights an :class:`ExpertCache` keeps."""


class ExpertCache(ABC):
    """Which experts of one layer the device has.

    Attributes:
        hits: times that a forward needed an expert that was there.
        misses: times that one had to be copied.
        copied_bytes: of those copies.

    Args:
        job: whose device it is.
        count: experts of the layer on this rank.
        room: how many the device has room for.
    """

    def __init__(self, job: Job, count: int, room: int) -> None:
        self.count, self.room = count, min(room, count)
        self.hits = self.misses = self.copied_bytes = 0
        self._device, self._pin = job.device, job.accelerator.pin_memory
        self._dtype = Precision.of(job.plan).parameter
        # By number of the expert, least recently used first: which place it has.
        self._places: dict[int, int] = {}
        self._taken: list[tuple[nn.Module, str, nn.Parameter]] = []

    @property
    def parts(self) -> Sequence[nn.Module]:
        """Modules whose own parameters are kept so."""
        return tuple(part for part in self._modules() if part._parameters)

    def store(self, part: nn.Module) -> None:
        """Move own parameters of one of :attr:`parts` to host memory, if they have values.

        They are attributes afterwards, no parameters: nothing else is to move, save or train them.

        Raises:
            ConfigError: a parameter is kept in parts (ZeRO's third stage).
        """
        for name, parameter in list(part._parameters.items()):
            if parameter is None or parameter.is_meta:
                continue
            if hasattr(parameter, "drivetrain_handle"):
                raise ConfigError(
                    "moe.cached_experts: weights of experts are sharded already (zero.Init), so "
                    "they cannot lie whole in host memory: build the model without it"
                )
            value = parameter.detach()
            if self._dtype is not None and value.is_floating_point():
                value = value.to(self._dtype)
            host = self._host(value)
            own = nn.Parameter(host, requires_grad=parameter.requires_grad)
            self._taken.append((part, name, own))
            del part._parameters[name]
            vars(part)[name] = self._kept(part, name, host)

    def release(self) -> None:
        """Make parameters of the weights in host memory again, of all experts; ends the cache."""
        for part, name, own in self._taken:
            vars(part).pop(name, None)
            part.register_parameter(name, own)
        for part in self._modules():
            vars(part).pop(MARK, None)
        self._taken.clear()

    def around(self, compute: Compute) -> Compute:
        """``compute`` with the weights that it needs.

        Args:
            compute: rows [n, d] in order of places, and rows of each place, to answers [n, d].

        Returns:
            The same for rows in order of this rank's experts.
        """

        def cached(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            numbers: list[int] = counts.tolist()
            used = [expert for expert, number in enumerate(numbers) if number]
            if not used:
                return rows
            pieces, found = torch.split(rows, numbers), dict[int, torch.Tensor]()
            for group in self._turns(used):
                self._fetch(group)
                order = sorted(group, key=self._places.__getitem__)
                parts = [pieces[expert] for expert in order]
                answers = self._computed(compute, order, rows if order == used else None, parts)
                found.update(zip(order, answers, strict=True))
            return torch.cat([found[expert] for expert in used])

        return cached

    def _turns(self, used: Sequence[int]) -> Iterator[list[int]]:
        """Groups of experts that the device has room for: first those that are there."""
        left = [
            *(e for e in used if e in self._places),
            *(e for e in used if e not in self._places),
        ]
        for first in range(0, len(left), self.room):
            yield left[first : first + self.room]

    def _fetch(self, group: Sequence[int]) -> None:
        """Have the device have all of ``group``."""
        for expert in group:
            if expert in self._places:
                self.hits += 1
                self._places[expert] = self._places.pop(expert)  # the most recent one
        for expert in group:
            if expert not in self._places:
                self.misses += 1
                self._places[expert] = place = self._free(group)
                self.copied_bytes += self._copy(expert, place)

    def _free(self, group: Sequence[int]) -> int:
        """A place that no expert of ``group`` has."""
        if len(self._places) < self.room:
            return len(self._places)
        oldest = next(expert for expert in self._places if expert not in group)
        return self._places.pop(oldest)

    def _host(self, value: torch.Tensor) -> torch.Tensor:
        value = value.to("cpu", copy=value.device.type != "cpu").contiguous()
        return self._pin(value)

    @abstractmethod
    def _modules(self) -> Iterator[nn.Module]:
        """Modules with weights of experts."""

    @abstractmethod
    def _kept(self, part: nn.Module, name: str, host: torch.Tensor) -> torch.Tensor:
        """Take a weight that lies in host memory; what ``part`` has in its place."""

    @abstractmethod
    def _copy(self, expert: int, place: int) -> int:
        """Begin to copy the weights of ``expert`` to a place; how many bytes they have."""

    @abstractmethod
    def _computed(
        self,
        compute: Compute,
        order: Sequence[int],
        rows: torch.Tensor | None,
        parts: Sequence[torch.Tensor],
    ) -> Sequence[torch.Tensor]:
        """Answers of experts that the device has.

        Args:
            compute: see :meth:`around`.
            order: the experts, by place.
            rows: those of all of them, if they lie in this order already.
            parts: of each.
        """


class FusedCache(ExpertCache):
    """Experts in fused tensors, of which each has an equal number of rows.

    The module has tensors with as many experts as there is room for, and computes with those.

    Args:
        job: whose device it is.
        module: the experts.
        count: how many it has.
        room: how many the device has room for.
    """

    def __init__(self, job: Job, module: nn.Module, count: int, room: int) -> None:
        super().__init__(job, count, room)
        self._module = module
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []  # on the host, on the device

    def _modules(self) -> Iterator[nn.Module]:
        return self._module.modules()

    def _kept(self, part: nn.Module, name: str, host: torch.Tensor) -> torch.Tensor:
        each = host.shape[0] // self.count
        here = host.new_zeros((self.room * each, *host.shape[1:]), device=self._device)
        rest = (each, *host.shape[1:])
        self._tensors.append((host.view(self.count, *rest), here.view(self.room, *rest)))
        return here

    def _copy(self, expert: int, place: int) -> int:
        for host, here in self._tensors:
            here[place].copy_(host[expert], non_blocking=True)
        return sum(host[expert].nbytes for host, _ in self._tensors)

    def _computed(
        self,
        compute: Compute,
        order: Sequence[int],
        rows: torch.Tensor | None,
        parts: Sequence[torch.Tensor],
    ) -> Sequence[torch.Tensor]:
        sizes, counts = [len(part) for part in parts], [0] * self.room
        for expert, size in zip(order, sizes, strict=True):
            counts[self._places[expert]] = size
        rows = torch.cat(list(parts)) if rows is None else rows
        return torch.split(compute(rows, torch.tensor(counts, device=rows.device)), sizes)


class ModuleCache(ExpertCache):
    """Experts that are modules of one class, each called by itself.

    Those that the device has share tensors there with those that had the place before.

    Args:
        job: whose device it is.
        experts: the modules.
        room: how many the device has room for.
    """

    def __init__(self, job: Job, experts: Sequence[nn.Module], room: int) -> None:
        super().__init__(job, len(experts), room)
        self._experts = experts
        self._number = {part: i for i, expert in enumerate(experts) for part in expert.modules()}
        self._hosts: list[list[tuple[nn.Module, str, torch.Tensor]]] = [[] for _ in experts]
        self._here: list[list[torch.Tensor]] = [[] for _ in range(self.room)]

    def _modules(self) -> Iterator[nn.Module]:
        return iter(self._number)

    def _kept(self, part: nn.Module, name: str, host: torch.Tensor) -> torch.Tensor:
        self._hosts[self._number[part]].append((part, name, host))
        return host

    def _copy(self, expert: int, place: int) -> int:
        weights, here = self._hosts[expert], self._here[place]
        if not here:
            here.extend(torch.empty_like(host, device=self._device) for *_, host in weights)
        for (part, name, host), there in zip(weights, here, strict=True):
            there.copy_(host, non_blocking=True)
            vars(part)[name] = there
        return sum(host.nbytes for *_, host in weights)

    def _computed(
        self,
        compute: Compute,
        order: Sequence[int],
        rows: torch.Tensor | None,
        parts: Sequence[torch.Tensor],
    ) -> Sequence[torch.Tensor]:
        outputs = [self._experts[expert](part) for expert, part in zip(order, parts, strict=True)]
        return [output[0] if isinstance(output, tuple) else output for output in outputs]
