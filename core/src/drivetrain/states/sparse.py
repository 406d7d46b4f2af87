"""Summing embedding gradients by their touched rows instead of whole."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from drivetrain.contracts.state.parameters import ParameterTable
    from drivetrain.contracts.world.axis import Axis
    from drivetrain.contracts.world.collective import Tag
    from drivetrain.contracts.world.communicator import Communicator


def mark_sparse(module: nn.Module, table: ParameterTable) -> None:
    """Let the gradients of embedding tables travel by rows."""
    for part in module.modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            for parameter in part.parameters(recurse=False):
                table.info(parameter).sparse = True


def sum_sparse_rows(
    communicator: Communicator, gradient: torch.Tensor, axis: Axis, tag: Tag
) -> None:
    """Sum ``gradient`` [rows, ...] over ``axis`` in place, moving only rows that are not zero.

    Every rank sends its row indices and rows, padded to the largest count; the sum is taken in
    rank order on every rank, so all ranks end with the same bits. Pays when few rows are touched:
    it moves size x touched rows where an all-reduce moves about twice all rows.
    """
    size = communicator.size(axis)
    rows = gradient.view(gradient.shape[0], -1)
    touched = rows.ne(0).any(dim=1).nonzero().view(-1)
    counts = torch.zeros(size, dtype=torch.int64, device=gradient.device)
    mine = torch.tensor([touched.numel()], dtype=torch.int64, device=gradient.device)
    communicator.all_gather(counts, mine, axis, replace(tag, site="sparse row counts"))
    most = int(counts.max())
    if most == 0:
        return
    indices = touched.new_zeros(most)
    indices[: touched.numel()] = touched
    values = rows.new_zeros(most, rows.shape[1])
    values[: touched.numel()] = rows[touched]
    all_indices = indices.new_empty(size * most)
    all_values = values.new_empty(size * most * rows.shape[1])
    communicator.all_gather(all_indices, indices, axis, replace(tag, site="sparse row indices"))
    communicator.all_gather(all_values, values.view(-1), axis, replace(tag, site="sparse rows"))
    rows.zero_()
    # Padding adds zero rows to row 0. index_add_ on the host runs in order; rank by rank keeps the
    # order of additions fixed on devices too.
    for rank in range(size):
        part = slice(rank * most, (rank + 1) * most)
        rows.index_add_(0, all_indices[part], all_values.view(-1, rows.shape[1])[part])
