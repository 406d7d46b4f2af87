"""What is known of the inputs of layers while calibration data passes through a block."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_compression.calibrated.results import exact_products
from drivetrain_compression.recipe.modifier import Target

_MOST = 64.0
"""How much more than the median a token may count in gram matrices, by the square of its size.

In many language models the first token of a row, and a few others, are a thousand times as large as
the rest where a block's last layer takes them. What comes out is divided by its size before
anything reads it, so an error there is no worse than elsewhere; by their squares such tokens would
be all that counts, and damping by a share of the diagonal's mean would be larger than the entries
of the other features.
"""

_KEPT, _KEPT_OF_BATCH = 512, 64
"""Tokens that are kept as they are, of all data and of one batch."""

_APART = 4
"""Every so many batches one is counted apart, where choices are held to data not fitted to."""


class Inputs:
    """Sums over all tokens that came to one input, which several layers may share.

    Args:
        width: in.
        device: of the inputs.
        gram: sum whole gram matrices.
        keep: keep some tokens.
        split: sum the gram matrices of some batches apart.

    Attributes:
        gram: [in, in], mean of ``x x^T`` times 2 (the Hessian of the squared error), float32; a
            token counts at most as much as 64 of its batch's median size.
        kept: [n, in], some of the tokens, evenly from each batch, until there are 512.
        parts: ``gram`` of most batches, and of those apart; ``None`` unless there are both.
        top: [in], largest size.
        mean: [in], mean size.
        tokens: number of them.
    """

    def __init__(
        self,
        width: int,
        device: torch.device,
        *,
        gram: bool,
        keep: bool = False,
        split: bool = False,
    ) -> None:
        self._grams = [torch.zeros(width, width, device=device) for _ in range(gram + split)]
        self._counts = [0, 0]
        self._keep = keep
        self._rows: list[torch.Tensor] = []
        self._squares = torch.zeros(width, device=device)
        self.top = torch.zeros(width, device=device)
        self._sizes = torch.zeros(width, device=device)

    @property
    def tokens(self) -> int:
        return sum(self._counts)

    @property
    def gram(self) -> torch.Tensor:
        first, *rest = self._grams
        return sum(rest, first) * (2 / max(self.tokens, 1))

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        if len(self._grams) < 2 or not all(self._counts):
            return None
        first, second = (g * (2 / n) for g, n in zip(self._grams, self._counts, strict=True))
        return first, second

    @property
    def kept(self) -> torch.Tensor:
        return torch.cat(self._rows)

    @property
    def squares(self) -> torch.Tensor:
        """[in], mean of squares times 2; the diagonal of the gram matrix."""
        sums = [g.diagonal() for g in self._grams] or [self._squares]
        return torch.stack(sums).sum(0) * (2 / max(self.tokens, 1))

    @property
    def mean(self) -> torch.Tensor:
        return self._sizes / max(self.tokens, 1)

    def add(self, x: torch.Tensor, *, apart: bool = False) -> None:
        """Count tokens [n, in]; ``apart`` where there is a gram matrix for that."""
        x = x.float() if x.dtype == torch.float64 else x
        part = int(apart and len(self._grams) > 1)
        self._counts[part] += len(x)
        if self._keep and sum(map(len, self._rows)) < _KEPT:
            rows = x[:: -(-len(x) // _KEPT_OF_BATCH)]
            self._rows.append(rows.to(torch.float32, copy=True))  # a layer may write into its input
        if self._grams:
            even = _evened(x)
            with exact_products() if x.dtype == torch.bfloat16 else nullcontext():
                self._grams[part].addmm_(even.T, even)
        else:
            self._squares += torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()
        size = x.abs()  # as narrow as it came, which loses nothing
        self._sizes += size.sum(0, dtype=torch.float32)
        torch.maximum(self.top, size.amax(0).float(), out=self.top)


def _evened(x: torch.Tensor) -> torch.Tensor:
    """Tokens [n, in] in float32, the largest made smaller."""
    squares = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square()
    most, wide = _MOST * squares.median(), x.float()
    large = squares > most
    if most == 0 or not large.any():
        return wide
    return wide * torch.where(large, (most / squares).sqrt(), 1.0)[:, None]


class Watch:
    """Counts the inputs of layers from hooks, and which layers get one tensor.

    Args:
        targets: linear layers.
        gram: gather whole gram matrices; else only what is as long as an input.
        keep: keep some tokens, too.
        split: gather gram matrices of some batches apart.
    """

    def __init__(
        self, targets: Sequence[Target], *, gram: bool, keep: bool = False, split: bool = False
    ) -> None:
        self._of_inputs = {"gram": gram, "keep": keep, "split": split}
        self._batch = 0
        self._of: dict[str, Inputs] = {}
        self._leader: dict[str, str] = {}
        self._now: dict[tuple[Any, ...], str] = {}
        self._alive: list[torch.Tensor] = []
        self.kept: torch.Tensor | None = None
        self._hooks = [
            target.module.register_forward_pre_hook(self._hook(target.name), with_kwargs=True)
            for target in targets
        ]

    def next(self) -> None:
        """Forget tensors of the batch that has passed."""
        self._batch += 1
        self._now.clear()
        self._alive.clear()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self.next()

    def of(self, name: str) -> Inputs:
        """The inputs of the layer ``name``.

        Raises:
            ConfigError: no token came to it, or one with NaN or infinity.
        """
        found = self._of.get(self._leader.get(name, name))
        if found is None or found.tokens == 0:
            raise ConfigError(
                f"no token of the calibration data came to {name}; give more or other data, or "
                "exclude it"
            )
        if not torch.isfinite(found.top).all():
            raise ConfigError(
                f"the inputs of {name} have NaN or infinity on the calibration data; look at the "
                "data and the model's dtype, or exclude it"
            )
        return found

    def shared(self, names: Sequence[str]) -> list[list[str]]:
        """``names`` in groups that get the same tensor."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self._leader.get(name, name), []).append(name)
        return list(groups.values())

    def _hook(self, name: str) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else kwargs["input"]).detach()
            key = (x.data_ptr(), tuple(x.shape), x._version)
            leader = self._now.setdefault(key, name)
            known = self._leader.setdefault(name, leader)
            if leader != name and known == leader:
                return  # counted for the layer that got it first
            if known != name:
                raise ConfigError(
                    f"{name} and {known} got one input for some data and two for other; exclude one"
                )
            self._alive.append(x)  # so that no other tensor gets its place in memory
            rows = self._tokens(x)
            if name not in self._of:
                self._of[name] = Inputs(x.shape[-1], x.device, **self._of_inputs)
            self._of[name].add(rows, apart=self._batch % _APART == _APART - 1)

        return count

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is not None and x.shape[:-1] == self.kept.shape:
            return x[self.kept]
        return x.reshape(-1, x.shape[-1])
