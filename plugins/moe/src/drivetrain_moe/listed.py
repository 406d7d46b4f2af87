"""Experts in a list of modules, which the forward of the list or of the module around it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.errors import TrainingError
from drivetrain_moe.cache import ExpertCache, ModuleCache
from drivetrain_moe.exchange import HERE, reaching, through_sorted
from drivetrain_moe.experts import describe_modules
from drivetrain_moe.found import FoundExperts, experts_in
from drivetrain_moe.own_numbers import default_state, set_default_state
from drivetrain_moe.section import EXPERT_PARALLEL
from drivetrain_moe.shared import PROBES, SharedExperts, random_tokens, unlike

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_moe.axes import ExpertAxes
    from drivetrain_moe.load import Load


class ListedExperts(SharedExperts):
    """Experts in a list, which the forward of the list or of the module around it calls.

    That forward runs twice: once with modules in the experts' places that note their tokens and
    return zeros, so that all tokens travel together, and once with modules that return the answers.
    Tokens have a graph from the first time, weights from the second; random numbers are the same.
    """

    def __init__(self, found: FoundExperts, load: Load, rate: float) -> None:
        super().__init__(found, load, rate)
        self._names = list(experts_in(found.module))
        self._order = list(found.module._modules)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the forward returns with all experts."""
        if self.way is HERE and self.cache is None:
            return self._here(*args, **kwargs)
        hidden = next(x for x in (*args, *kwargs.values()) if _is_floating(x))
        devices = {torch.device("cpu"), hidden.device} - {torch.device("meta")}
        before = {device: default_state(device) for device in devices}
        notes = {name: _Noting() for name in self._names}
        with self._in_place(notes):
            self._inner(*args, **kwargs)
        nothing = hidden.reshape(-1, hidden.shape[-1])[:0]
        rows = [nothing if note.rows is None else note.rows for note in notes.values()]
        counts = torch.tensor([len(x) for x in rows], device=hidden.device)
        self._count(counts)
        answers = through_sorted(torch.cat(rows), counts, self._with(self._compute), self.way)
        for note, piece in zip(notes.values(), torch.split(answers, counts.tolist()), strict=True):
            note.answer(piece)
        after = {device: default_state(device) for device in devices}
        for device in devices:
            set_default_state(device, before[device])
        with self._in_place(notes):
            outputs = self._inner(*args, **kwargs)
        for device in devices:  # what experts have drawn is not to be drawn again
            set_default_state(device, after[device])
        if any(note.calls for note in notes.values()):
            return outputs
        # No token of this rank has an expert, but backward has to come through the exchange, and
        # to the router, whose gradients other ranks reduce before it.
        first, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        inside = set(self.module.parameters())
        beside = [p for p in self._found.owner.parameters() if p not in inside and p.requires_grad]
        reached = reaching(first, answers, *beside)
        return (reached, *others) if isinstance(outputs, tuple) else reached

    def keep(self, job: Job, axes: ExpertAxes, *, check: bool) -> None:
        own = self._found.count // axes.size
        first = own * job.mesh.coordinate(axes.experts)
        for number, name in enumerate(self._names):
            if not first <= number < first + own:
                del self.module._modules[name]
        if check:
            self._check_rows()

    def cached(self, job: Job, room: int) -> ExpertCache:
        self.cache = ModuleCache(job, list(experts_in(self.module).values()), room)
        return self.cache

    def describe(self, job: Job, axes: ExpertAxes) -> None:
        for expert in experts_in(self.module).values():
            describe_modules(expert, job, axes)

    def _compute(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows [n, d] in order of this rank's experts, each of which is called."""
        pieces = torch.split(rows, counts.tolist())
        experts = experts_in(self.module).values()
        return torch.cat([expert(piece) for expert, piece in zip(experts, pieces, strict=True)])

    def _here(self, *args: Any, **kwargs: Any) -> Any:
        """The forward as it is; what its experts compute is counted."""
        counting = {name: _Counting(self.module._modules[name]) for name in self._names}
        with self._in_place(counting):
            outputs = self._inner(*args, **kwargs)
        counts = [expert.count for expert in counting.values()]
        self._count(torch.tensor(counts, device=next(self.module.parameters()).device))
        return outputs

    def _check_rows(self) -> None:
        """Compare a few tokens in one order with the same in another.

        Raises:
            ConfigError: an expert does not compute each token by itself, or changes its width.
        """
        expert = next(iter(experts_in(self.module).values()))
        parameters = list(expert.parameters())
        if any(p.is_meta for p in parameters):
            return
        training = expert.training
        expert.eval()
        try:
            with torch.no_grad():
                for x in random_tokens(parameters, 2 * PROBES):
                    try:
                        outputs = expert(x)
                    except (RuntimeError, ValueError, TypeError):  # tokens have another width
                        continue
                    if isinstance(outputs, torch.Tensor) and outputs.shape == x.shape:
                        self._compare(expert(x.flip(0)).flip(0), outputs)
                        return
        finally:
            expert.train(training)
        raise unlike(self._found, "one by one, and return as many of the same width")

    @contextmanager
    def _in_place(self, others: Mapping[str, nn.Module]) -> Iterator[None]:
        """Have the container hold ``others`` in place of the experts of all ranks, in order."""
        before = self.module._modules
        self.module._modules = {name: others.get(name) or before[name] for name in self._order}
        try:
            yield
        finally:
            self.module._modules = before


class _Noting(nn.Module):
    """Notes the tokens of one expert, and later returns its answers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: torch.Tensor | None = None
        self.calls = 0
        """Since the answers are there, or since the beginning."""
        self._answers: torch.Tensor | None = None

    def answer(self, answers: torch.Tensor) -> None:
        """Have the next call return ``answers`` [n, d]."""
        self._answers, self.calls = answers, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 1:
            raise TrainingError(
                f"{EXPERT_PARALLEL}: an expert of a list was called twice in one forward, and its "
                "tokens travel once: place drivetrain_moe.MoE in the model instead"
            )
        if self._answers is not None:
            return self._answers.reshape(x.shape)
        self.rows = x.reshape(-1, x.shape[-1])
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return torch.zeros_like(x, dtype=dtype)


class _Counting(nn.Module):
    """Calls an expert, and counts its tokens."""

    def __init__(self, expert: nn.Module | None) -> None:
        super().__init__()
        self.count = 0
        self._call: Callable[..., Any] = partial(_called, expert)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.count += x.shape[:-1].numel()
        return self._call(x, *args, **kwargs)


def _called(expert: nn.Module | None, *args: Any, **kwargs: Any) -> Any:
    assert expert is not None
    return expert(*args, **kwargs)


def _is_floating(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()
