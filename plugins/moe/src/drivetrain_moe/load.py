"""How many tokens the experts of a layer get: reports, and balance by a bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import Purpose, Tag

if TYPE_CHECKING:
    from drivetrain.job.job import Job


class Load:
    """Counts tokens by expert.

    The report of a step has, under ``moe/LAYER/``: ``load`` [E], the share of choices of each
    expert; ``entropy`` of it, 1 where it is even; ``imbalance``, the busiest expert's share times
    E; ``dropped``, choices that no expert had room for; and ``balance``, the balancing loss. All
    are means over micro-batches and ranks.

    Args:
        job: whose report it is.
        name: of the layer.
        experts: how many.
        reports: whether the report has it.
    """

    def __init__(self, job: Job, name: str, experts: int, *, reports: bool) -> None:
        self.job = job
        self.since_update: torch.Tensor | None = None
        """Tokens by expert since the last update, on this rank; kept where a bias follows them."""
        self.follows = False
        self._prefix = f"moe/{name}/"
        self._reports = reports
        if reports:
            job.values.declare(f"{self._prefix}load", experts)
            for value in ("entropy", "imbalance", "dropped", "balance"):
                job.values.declare(self._prefix + value)

    def add(
        self,
        wanted: torch.Tensor,
        dropped: torch.Tensor | None = None,
        balance: torch.Tensor | None = None,
    ) -> None:
        """Count one micro-batch.

        Args:
            wanted: [E] tokens that chose each expert.
            dropped: 0-d, choices without room.
            balance: 0-d, the balancing loss.
        """
        if torch._C._current_graph_task_id() != -1:  # a forward that is repeated in backward
            return
        if self.follows:
            before = self.since_update
            self.since_update = wanted.clone() if before is None else before + wanted
        if not self._reports:
            return
        load = wanted.float() / wanted.sum().clamp(min=1)
        entropy = -torch.xlogy(load, load).sum() / torch.tensor(float(max(2, len(load)))).log()
        add, prefix = self.job.values.add, self._prefix
        add(f"{prefix}load", load)
        add(f"{prefix}entropy", entropy)
        add(f"{prefix}imbalance", load.max() * len(load))
        if dropped is not None:
            add(f"{prefix}dropped", dropped.float())
        if balance is not None:
            add(f"{prefix}balance", balance.float())


def move_biases(job: Job, layers: Sequence[tuple[torch.Tensor, Load, float]]) -> None:
    """Move correction biases towards equal load, after an update. Collective over ``data``.

    Each goes up by its rate where an expert got fewer tokens than the mean, and down where it got
    more (DeepSeek-AI 2024, "DeepSeek-V3", 2.1.2).

    Args:
        job: whose ranks' tokens are counted.
        layers: bias [E], its load, and the rate.
    """
    if not layers:
        return
    counts = [
        torch.zeros_like(bias, dtype=torch.float32)
        if load.since_update is None
        else load.since_update.to(torch.float32)
        for bias, load, _ in layers
    ]
    flat = torch.cat(counts)
    job.communicator.all_reduce(flat, "data", Tag(Purpose.STATE, site="load of experts"))
    totals = torch.split(flat, [len(count) for count in counts])
    with torch.no_grad():
        for (bias, load, rate), total in zip(layers, totals, strict=True):
            bias += rate * torch.sign(total.mean() - total).to(bias.dtype)
            load.since_update = None
