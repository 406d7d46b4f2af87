"""Linear layers in tiles, so that stage 3 never gathers one whole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.states.whole import whole


class TiledLinear(nn.Module):
    """``nn.Linear`` cut into ``out_splits`` times ``in_splits`` linear layers.

    Each tile is a unit of its own: under stage 3 one tile after another is gathered and released,
    so the largest part in memory is a tile. Sizes that do not divide are cut as evenly as possible.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether to add a bias; it belongs to the last tile of each row.
        in_splits: number of parts that the input is cut into.
        out_splits: number of parts that the output is cut into.
        input_is_already_split: the input is given as a list of ``in_splits`` parts.
        combine_out_splits: whether the output parts are concatenated, else returned as a list.
        linear_cls: class of the tiles.
        init_linear: a layer whose weights are taken.
        kwargs: further arguments of ``linear_cls``.

    Attributes:
        in_parts: where the parts of the input begin, and where the last one ends.
        out_parts: likewise of the output.

    Raises:
        ConfigError: there are more parts than features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: type[nn.Module] = nn.Linear,
        init_linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.in_splits, self.out_splits = in_splits, out_splits
        self.input_is_already_split = input_is_already_split
        self.combine_out_splits = combine_out_splits
        self.in_parts = _cuts("in", in_features, in_splits)
        self.out_parts = _cuts("out", out_features, out_splits)
        self.linears = nn.ModuleList()
        for top, bottom in pairwise(self.out_parts):
            row = nn.ModuleList()
            for number, (left, right) in enumerate(pairwise(self.in_parts), start=1):
                last = bias and number == in_splits
                tile = linear_cls(right - left, bottom - top, bias=last, **kwargs)
                tile.drivetrain_unit = True  # type: ignore[assignment]
                row.append(tile)
            self.linears.append(row)
        if init_linear is not None:
            self.copy_params_from(init_linear)

    def forward(self, input_: torch.Tensor | Sequence[torch.Tensor]) -> Any:
        """[..., in_features] (or its parts) -> [..., out_features] (or its parts)."""
        parts = self._parts(input_)
        outputs = [self._row(row, parts) for row in self.linears]
        return torch.cat(outputs, dim=-1) if self.combine_out_splits else outputs

    @torch.no_grad()
    def copy_params_from(self, other: nn.Module) -> None:
        """Take weight [out_features, in_features] and bias [out_features] of a linear layer.

        Collective where either layer is sharded.

        Raises:
            ConfigError: shapes differ, or only one of the two has a bias.
        """
        weight: Any = other.weight
        bias: Any = getattr(other, "bias", None)
        has_bias = getattr(self.linears[0][-1], "bias", None) is not None  # type: ignore[index]
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ConfigError(
                f"TiledLinear of {self.out_features} x {self.in_features} cannot take a weight of "
                f"shape {tuple(weight.shape)}"
            )
        if (bias is not None) is not has_bias:
            raise ConfigError(
                "TiledLinear and the layer to copy from must both have a bias or none"
            )
        with whole(other):
            for (top, bottom), row in zip(pairwise(self.out_parts), self._rows(), strict=True):
                for (left, right), tile in zip(pairwise(self.in_parts), row, strict=True):
                    with whole(tile, write_rank=0):
                        tile.weight.copy_(weight[top:bottom, left:right])
                        if tile.bias is not None:
                            tile.bias.copy_(bias[top:bottom])

    def _rows(self) -> list[list[Any]]:
        return [list(row) for row in self.linears]  # type: ignore[call-overload]

    def _parts(self, input_: torch.Tensor | Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if not self.input_is_already_split:
            assert isinstance(input_, torch.Tensor)
            sizes = [right - left for left, right in pairwise(self.in_parts)]
            return torch.split(input_, sizes, dim=-1)
        if len(input_) != self.in_splits:
            raise ConfigError(
                f"TiledLinear expects its input in {self.in_splits} parts, got {len(input_)}"
            )
        return list(input_)

    def _row(self, row: Any, parts: Sequence[torch.Tensor]) -> Any:
        total = None
        for tile, part in zip(row, parts, strict=True):
            output = tile(part)
            total = output if total is None else total + output
        return total


class TiledLinearReturnBias(TiledLinear):
    """Like :class:`TiledLinear`, of layers that return (output, bias) without adding the bias."""

    def forward(self, input_: torch.Tensor | Sequence[torch.Tensor]) -> Any:
        """As :meth:`TiledLinear.forward`; returns (output, bias), each combined or as parts."""
        parts = self._parts(input_)
        pairs = [self._row(row, parts) for row in self.linears]
        outputs, biases = [output for output, _ in pairs], [bias for _, bias in pairs]
        if not self.combine_out_splits:
            return outputs, biases
        given = [bias for bias in biases if bias is not None]
        return torch.cat(outputs, dim=-1), torch.cat(given, dim=-1) if given else None

    def _row(self, row: Any, parts: Sequence[torch.Tensor]) -> Any:
        total, bias = None, None
        for tile, part in zip(row, parts, strict=True):
            output, bias = tile(part)
            total = output if total is None else total + output
        return total, bias


def _cuts(which: str, features: int, splits: int) -> list[int]:
    """Where parts begin and end; they differ by at most one in size."""
    if not 1 <= splits <= features:
        raise ConfigError(
            f"TiledLinear: {which}_splits is {splits}, expected 1 to {which}_features = {features}"
        )
    sizes = [features // splits + (part < features % splits) for part in range(splits)]
    return [0, *accumulate(sizes)]
