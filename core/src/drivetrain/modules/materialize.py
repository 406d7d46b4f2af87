"""Memory and values for what a module has on the meta device: this rank's part, from anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.checkpoint.agreement import any_rank, same_everywhere, worst
from drivetrain.errors import CheckpointError, ConfigError
from drivetrain.modules.converted import converted
from drivetrain.modules.drawing import Drawing, Initialiser
from drivetrain.modules.places import Placed, placed
from drivetrain.modules.wanted import Wanted, by_part
from drivetrain.modules.weights import MappedWeights, Weights, fill, weights_at

if TYPE_CHECKING:
    from drivetrain.contracts.state.parameters import ParameterTable
    from drivetrain.job.job import Job

WeightSource = str | os.PathLike[str] | Mapping[str, Any] | Initialiser
"""Files, a mapping of names to whole tensors, or what fills one whole tensor after another."""

Made = Callable[[nn.Module], object]
"""Called with a submodule whose own parameters and buffers have just got values."""

_LISTED = 10


def has_meta(module: nn.Module) -> bool:
    """Whether a parameter or buffer is on the meta device."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


@torch.inference_mode(False)  # tensors made in it could not be trained
def materialize(
    module: nn.Module,
    weights: WeightSource | None = None,
    *,
    job: Job,
    made: Made = lambda part: None,
) -> None:
    """Give every parameter and buffer of ``module`` on the meta device memory and values.

    Collective. A rank gets what its module has, which may be a part of the client's: names and
    placements are those of ``job.parameters``. Values are read box by box, or drawn whole in host
    memory, one submodule at a time, from streams of random numbers with the job's seed that are
    the same on any layout. What is tied stays tied, and what has memory stays as it is. Does
    nothing in a job whose device is ``meta``.

    Args:
        module: changed in place: its parameters on the meta device are replaced.
        weights: where values come from. A path or URL: of a checkpoint in any layout, of a run's
            folder, of a safetensors file, or of a folder with ``model.safetensors`` or its index. A
            mapping of names to whole tensors. Names and shapes are the module's, or others that its
            library converts (:mod:`drivetrain.modules.converted`). A callable ``(name, tensor,
            generator)``, which fills one whole tensor. ``None``: the ``reset_parameters()`` of each
            submodule, which gives its own parameters and buffers values; it also makes buffers that
            belong to no ``state_dict``, so that files and mappings lack them.
        job: names, device, seed, and the other ranks.
        made: called with each submodule that has got values, in the order of ``named_modules``.

    Raises:
        CheckpointError: on every rank, before anything is changed: lists names that are missing,
            names that no rank's module has, and shapes that differ. Or a file is damaged.
        ConfigError: a submodule has no ``reset_parameters()``, or a tensor cannot be made.
    """
    if job.device.type == "meta":
        return  # nothing will run
    table = job.parameters
    if weights is None or callable(weights):
        drawing = Drawing(job.random.seed, weights)
        draw(module, drawing, table=table, device=job.device, made=made)
        return
    if not isinstance(weights, str | os.PathLike | Mapping):
        raise ConfigError(
            "weights must be a path, a mapping of names to tensors, or a callable (name, tensor, "
            f"generator), got {type(weights).__name__}"
        )
    with ExitStack() as stack:
        source = _open(job, stack, weights)
        work = _Work(placed(module), table, job.device, Drawing(job.random.seed), source)
        work.check(job, module)
        work.run(made)


def draw(
    module: nn.Module, drawing: Drawing, *, table: ParameterTable, device: torch.device, made: Made
) -> None:
    """Give what ``module`` has on the meta device initial values; see :func:`materialize`.

    Raises:
        ConfigError: a submodule has no ``reset_parameters()``, or a tensor cannot be made.
    """
    work = _Work(placed(module), table, device, drawing)
    if problems := work.flaws():
        raise ConfigError(problems)
    work.run(made)


def _open(
    job: Job, stack: ExitStack, weights: str | os.PathLike[str] | Mapping[str, Any]
) -> Weights:
    """Open a source on every rank, or on none. Collective."""
    problem, source = None, None
    opening: AbstractContextManager[Weights] = (
        nullcontext(MappedWeights(weights)) if isinstance(weights, Mapping) else weights_at(weights)
    )
    try:
        source = stack.enter_context(opening)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    if (found := worst(job, problem)) is not None:
        raise CheckpointError(f"the module gets no weights: {found}")
    assert source is not None
    return source


class _Work:
    """The tensors of one module that are on the meta device.

    Args:
        entries: all tensors of the module.
        table: names and placements; follows parameters that are replaced.
        device: gets the memory.
        drawing: makes what is not read.
        weights: are read; ``None`` if nothing is.
    """

    def __init__(
        self,
        entries: list[Placed],
        table: ParameterTable,
        device: torch.device,
        drawing: Drawing,
        weights: Weights | None = None,
    ) -> None:
        every = [Wanted.of(entry, table) for entry in entries]
        self._table, self._device, self._drawing, self._weights = table, device, drawing, weights
        self._known = {name for tensor in every for name in tensor.names}
        self._tensors = [tensor for tensor in every if tensor.entry.tensor.is_meta]
        self._find_sources()

    def _find_sources(self) -> None:
        names = () if self._weights is None else self._weights.names()
        for tensor in self._tensors:
            tensor.sources = [n for n in tensor.names if n in names and tensor.entry.saved]

    def flaws(self, missing: Collection[Wanted] = ()) -> list[str]:
        """Why tensors, but for those in ``missing``, cannot be made, one text for each."""
        tensors = (tensor for tensor in self._tensors if tensor not in missing)
        flaws = (tensor.flaw(self._drawing, self._weights) for tensor in tensors)
        return [flaw for flaw in flaws if flaw is not None]

    def check(self, job: Job, module: nn.Module) -> None:
        """Compare names and shapes with those of the source. Collective.

        Raises:
            CheckpointError: on every rank.
        """
        assert self._weights is not None
        place, problems = self._weights.place, list[str]()
        same = all(same_everywhere(job, "\n".join(sorted(self._weights.names()))))
        extra = self._foreign(job, same=same)
        if extra and same:
            try:
                self._weights = converted(self._weights, module, extra)
            except CheckpointError as error:
                problems.append(str(error))
            self._find_sources()
            extra = self._foreign(job, same=same)
        missing = [t for t in self._tensors if t.entry.saved and not t.sources]
        if missing:
            problems.append(f"{place} lacks {_listed(t.name for t in missing)}")
        if extra:
            problems.append(f"{place} has {_listed(extra)}, which no rank's module has")
        problems += self.flaws(missing)
        if (found := worst(job, "; ".join(problems) or None)) is not None:
            raise CheckpointError(f"weights do not fit the module: {found}")

    def _foreign(self, job: Job, *, same: bool) -> list[str]:
        """Names of the source that no rank's module has, where all have the same source."""
        assert self._weights is not None
        names = sorted(self._weights.names())
        known = [name in self._known for name in names]
        if same:  # a name may be another rank's
            known = any_rank(job, known)
        return [name for name, is_known in zip(names, known, strict=True) if not is_known]

    @torch.no_grad()
    def run(self, made: Made) -> None:
        """Make the tensors of one submodule after another.

        Raises:
            CheckpointError: bytes are damaged, or a tied tensor is stored with different values.
            ConfigError: a tensor was given no values.
        """
        for part, tensors in by_part(self._tensors).items():
            read = [tensor for tensor in tensors if tensor.sources]
            drawn = {t.entry.places[0][1]: t for t in tensors if not t.sources}
            if drawn:
                blanks = [tensor.blank for tensor in drawn.values()]
                for blank, whole in self._drawing.draw(part, blanks):
                    self._keep(drawn[blank.key], whole)
            if read:
                self._read(read)
            made(part)

    def _keep(self, tensor: Wanted, whole: torch.Tensor) -> None:
        new = tensor.empty(self._device)
        fill(tensor.fragment(new), whole)
        tensor.entry.replace(new, self._table)

    def _read(self, tensors: list[Wanted]) -> None:
        assert self._weights is not None
        new = [tensor.empty(self._device) for tensor in tensors]
        pairs = list(zip(tensors, new, strict=True))
        self._weights.fill([(t.sources[0], t.fragment(values)) for t, values in pairs])
        for tensor, values in pairs:
            for other in tensor.sources[1:]:
                copy = tensor.empty(self._device)
                self._weights.fill([(other, tensor.fragment(copy))])
                if not torch.equal(copy, values):
                    raise CheckpointError(
                        f"{tensor.sources[0]} and {other} are tied in the module, but differ in "
                        f"{self._weights.place}"
                    )
            tensor.entry.replace(values, self._table)


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = len(every) - _LISTED
    return ", ".join(every[:_LISTED]) + (f" and {more} more" if more > 0 else "")
