"""One exchange between replicas: each rank with those that have the same part elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from drivetrain_communication.diloco.codecs import Codec


class Exchange:
    """Counterparts of several replicas, connected for one exchange.

    It is a process group beside those of the job, over gloo, whatever the job's backend: values
    come from host memory and travel between hosts, and replicas come and go.

    Args:
        store: where the counterparts, and nobody else, meet.
        place: of this replica among them.
        size: how many there are.
        address: numeric address by which the others reach this process.
        timeout: how long nothing may arrive.

    Raises:
        RuntimeError: (as all methods do) a counterpart has ended, or nothing arrived in time.
    """

    def __init__(
        self, store: Store, place: int, size: int, address: str, timeout: timedelta
    ) -> None:
        self.place, self.size = place, size
        self.sent_bytes = 0
        gloo: Any = dist.ProcessGroupGloo  # whose stubs lack most of it
        options = gloo._Options()
        options._timeout = timeout
        options._devices = [gloo.create_device(hostname=address)]
        self._group: Any = gloo(store, place, size, options)

    def mean(self, values: torch.Tensor, codec: Codec, givers: Sequence[int]) -> torch.Tensor:
        """The mean over replicas of ``values`` [n], the same bits for all of them.

        Each replica sends slice i to replica i, which adds the slices up in order of replicas and
        sends the mean to all: 2 (k - 1) / k messages of n numbers leave each of k replicas.

        Args:
            values: of this replica.
            codec: how they travel, both ways.
            givers: places of the replicas whose values count; the others only receive.
        """
        if not values.numel():
            return values
        chunk = codec.padded(-(-values.numel() // self.size))
        rows = values.new_zeros(self.size * chunk)
        if self.place in givers:
            rows[: values.numel()] = values
        sent = codec.encode(rows.view(self.size, chunk))
        received = torch.empty_like(sent)
        self._group.alltoall_base(received, sent, [], []).wait()
        total = codec.decode(received, chunk)[list(givers)].sum(0, keepdim=True) / len(givers)
        own = codec.encode(total)
        gathered = own.new_empty(self.size * own.numel())
        self._group._allgather_base(gathered, own.view(-1)).wait()
        self.sent_bytes += (self.size - 1) * (sent[0].numel() + own.numel())
        means = codec.decode(gathered.view(self.size, -1), chunk)
        return means.reshape(-1)[: values.numel()].to(values.dtype)

    def hand_over(self, tensors: Sequence[torch.Tensor], source: int) -> None:
        """Overwrite ``tensors`` with those of the replica at place ``source``."""
        for tensor in (tensor for tensor in tensors if tensor.numel()):
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = source, 0
            self._group.broadcast([tensor], options).wait()
            if self.place == source:
                self.sent_bytes += (self.size - 1) * tensor.nbytes
