"""Parts of a sequence between regions: Megatron-LM's sequence parallelism.

Norms, dropout and residuals treat each token alone, so each rank has 1 / tp of them there, and of
the activations that are kept for backward (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198,
section 4.2.2). The sum at the end of a region becomes a reduce-scatter and the identity at its
beginning an all-gather, which together send what the sum did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.communication.functional import Functional, functional
from drivetrain.contracts import Purpose, Tag
from drivetrain_tensor.lazy_tensor import lazy

if TYPE_CHECKING:
    from drivetrain.contracts import Communicator


class SequenceParts:
    """Equal parts of a sequence; what the last ranks lack is padded while it travels.

    Args:
        tp: the ranks.
        extent: tokens of a sequence.
    """

    travels = True

    def __init__(self, tp: Functional, extent: int) -> None:
        self.tp, self.extent = tp, extent
        self.what = "hidden states (tensor_parallel.sequence_parallel)"
        self.size = -(-extent // tp.size)
        """Tokens of a part."""
        self.start = min(tp.rank * self.size, extent)
        self.length = min(self.size, extent - self.start)

    def assemble(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        """All tokens, whose gradient is the same on all ranks. Collective."""
        return self._cut(self.tp.gather(self._padded(part, dim, self.size), dim), dim, self.extent)

    def gather(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        """All tokens, of whose gradient each rank has a term. Collective."""
        every = self.tp.all_gather(self._padded(part, dim, self.size), dim)
        return self._cut(every, dim, self.extent)

    def scatter(self, terms: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's tokens of the sum of all ranks' terms. Collective."""
        padded = self._padded(terms, dim, self.size * self.tp.size)
        return self._cut(self.tp.reduce_scatter(padded, dim), dim, self.length)

    @staticmethod
    def _padded(x: torch.Tensor, dim: int, extent: int) -> torch.Tensor:
        missing = extent - x.shape[dim]
        behind = [0, 0] * (x.dim() - 1 - dim)
        return nn.functional.pad(x, [*behind, 0, missing]) if missing else x

    @staticmethod
    def _cut(x: torch.Tensor, dim: int, extent: int) -> torch.Tensor:
        x = x if x.shape[dim] == extent else x.narrow(dim, 0, extent)
        return x.contiguous()  # as models expect of what layers return


def sequence_of(
    part: torch.Tensor, extent: int, dim: int, communicator: Communicator
) -> torch.Tensor:
    """A whole sequence of ``extent`` tokens along ``dim`` that another stage has sent a part of."""
    tp = functional(communicator, "tp", Tag(Purpose.ACTIVATION, site="tensor parallel"))
    return lazy(part, SequenceParts(tp, extent), dim)


def summed(terms: torch.Tensor, tp: Functional, *, in_parts: bool) -> torch.Tensor:
    """The sum of terms [..., tokens, width] over ranks: g, or each rank its tokens. Collective.

    Sums stay whole in evaluation, where one rank alone may read them, for a compiler, and where
    there are fewer tokens than ranks.

    Args:
        terms: of this rank.
        tp: the ranks.
        in_parts: whether ranks share the sequence out.
    """
    dim = terms.dim() - 2
    shared = in_parts and terms.requires_grad and dim >= 0 and not torch.compiler.is_compiling()
    if not shared or terms.shape[dim] < tp.size:
        return tp.reduce(terms)
    parts = SequenceParts(tp, terms.shape[dim])
    return lazy(parts.scatter(terms, dim), parts, dim)
