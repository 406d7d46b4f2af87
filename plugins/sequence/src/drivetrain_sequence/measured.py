"""Sizes of tiles that follow from memory: a tile takes a small share of what is free."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drivetrain.contracts import Op, Purpose, Tag
from drivetrain_sequence.chunks.draws import Casts

if TYPE_CHECKING:
    from drivetrain.job.job import Job

logger = logging.getLogger("drivetrain.sequence")

SHARES = 32
"""Parts of the free memory of which a tile takes one: at the first forward there are no gradients,
states of optimizers and activations of later blocks yet, and all of them have to fit beside it."""

LEAST = 16
"""Tokens that a tile has in any case; with fewer, products of matrices wait for weights alone."""

UNKNOWN = 1024
"""Tokens of a tile where memory cannot be read, as in a rehearsal."""

_FEW = 4
"""Tokens of a row that are measured, and twice as many."""

_ALIKE = ("sp", "tp")
"""Axes whose ranks compute the same tiles, and may communicate in them."""


class MeasuredTile:
    """How many tokens the tiles of one key have; found out at the first forward.

    A token takes what the module makes for it, measured with a few tokens and with twice as many,
    and as much again for gradients.

    Args:
        job: its accelerator says what is free.
        key: of the section, for the log.
    """

    def __init__(self, job: Job, key: str) -> None:
        self._job = job
        self._key = key
        self._tokens: int | None = None

    def along(
        self,
        module: nn.Module,
        run: Callable[..., Any],
        whole: Sequence[torch.Tensor],
        dim: int = 1,
    ) -> int:
        """Tokens along ``dim`` of a tile. Collective at first, over ranks with the same tokens.

        Args:
            module: that ``run`` computes with.
            run: a function of single tokens.
            whole: what it is given of all tokens; what comes before ``dim`` is rows.
            dim: which dimension the tokens are.
        """
        if self._tokens is None:
            if whole[0].shape[dim] < 2:
                return 1
            self._tokens = self._find(module, run, whole, dim)
        return max(1, self._tokens // whole[0].shape[:dim].numel())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _find(
        self, module: nn.Module, run: Callable[..., Any], whole: Sequence[torch.Tensor], dim: int
    ) -> int:
        free = free_memory(self._job)
        each = bytes_of_token(module, run, whole, dim)
        tokens = UNKNOWN if free is None else max(LEAST, int(free / SHARES / max(each, 1)))
        if not whole[0].is_meta:  # of a rehearsal, which has no values to compare
            tokens = self._least_of_all(tokens)
        if self._job.rank == 0:
            logger.info(
                "sequence_parallel.%s: %d tokens at a time, of %.1f KiB each; %s",
                self._key,
                tokens,
                each / 2**10,
                "free memory is not known"
                if free is None
                else f"rank 0 has {free / 2**20:.0f} MiB free, of which a tile takes 1/{SHARES}",
            )
        return tokens

    def _least_of_all(self, tokens: int) -> int:
        """The smallest number of those of all ranks that compute the same tiles."""
        tag = Tag(Purpose.CONTROL, key=self._key, site="sequence parallelism")
        least = torch.tensor([tokens], device=self._job.device)
        for axis in _ALIKE:
            if self._job.mesh.size(axis) > 1:
                self._job.communicator.all_reduce(least, axis, tag, op=Op.MIN)
        return int(least)


def free_memory(job: Job) -> int | None:
    """Bytes of a rank's part of its device that it does not use; ``None`` if nothing tells.

    Ranks that share a device, as those on the cores of a host do, have equal parts of it.
    """
    accelerator = job.accelerator
    total = accelerator.total_memory()
    if not total:
        return None
    sharing = -(-job.ranks.ranks_on_host // max(1, accelerator.device_count()))
    return max(0, total // sharing - accelerator.memory_allocated())


def bytes_of_token(
    module: nn.Module, run: Callable[..., Any], whole: Sequence[torch.Tensor], dim: int
) -> float:
    """What a token takes in forward and backward: each tensor that is made, and its gradient.

    What is made once for all tokens, such as weights in another format, does not count.
    """
    few = min(_FEW, whole[0].shape[dim] // 2)
    made = []
    for count in (few, 2 * few):
        parts = [x.narrow(dim, 0, count).contiguous() for x in whole]
        with aside(module, whole[0].device), _Made(parts) as pieces:
            run(*parts)
        made.append(pieces.total)
    rows = whole[0].shape[:dim].numel()
    return float(2 * (made[1] - made[0]) / (few * rows))


@contextmanager
def aside(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Context of a forward that leaves no trace: nothing is drawn, no graph or cast is kept.

    A cast that is made without a graph would be taken for the weights of the next forward.
    """
    states = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), Casts(device).again():
            yield
    finally:
        for part, training in states.items():
            part.training = training


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory that operators return, each piece once, without that of ``given``."""

    def __init__(self, given: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._given = {x.untyped_storage()._cdata for x in given}
        # They are kept, so that no other piece of memory gets the name of one that is gone.
        self._pieces: dict[int, torch.UntypedStorage] = {}

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(piece.nbytes() for piece in self._pieces.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                piece = leaf.untyped_storage()
                if piece._cdata not in self._given:
                    self._pieces[piece._cdata] = piece
        return result
