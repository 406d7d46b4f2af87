"""What data sets in shards share: numbers of samples, their order, open files."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from drivetrain.errors import ConfigError, TrainingError
from drivetrain_data_efficiency.streaming.index import ShardIndex, bytes_of, open_shard
from drivetrain_data_efficiency.streaming.order import ShardOrder, block_of_shards

OPEN = 64
"""Files that a process keeps open."""

SHARDS_OF_A_BLOCK = 4


class ShardedDataset(Dataset[Any]):
    """Samples of shards by number, with an order in which they are read well.

    The loader asks :meth:`sample_order` in training. So mid-epoch resume, other numbers of ranks
    and workers, and accumulation are those of any data set with numbers: the order is a function of
    seed and epoch.

    Args:
        index: of the shards.
        counts: [parts], samples of each part that is shuffled as a whole.
        lanes: see :class:`ShardOrder`; best a multiple of data shards x workers.
        run: best the micro-batch.
        block: samples that are shuffled among each other; those of 4 parts if ``None``.

    Raises:
        ConfigError: there are no samples, or a number is below 1.
    """

    def __init__(
        self, index: ShardIndex, counts: Any, *, lanes: int, run: int, block: int | None
    ) -> None:
        self.index = index
        self.counts = np.asarray(counts, dtype=np.int64)
        self.block = block_of_shards(self.counts, SHARDS_OF_A_BLOCK) if block is None else block
        self._lanes, self._run = lanes, run
        self._ends = np.cumsum(self.counts)
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._process = os.getpid()
        self.sample_order(0)  # refuses numbers that make no order

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def sample_order(self, seed: int) -> ShardOrder:
        """The order that a loader deals out."""
        return ShardOrder(
            self.counts, seed=seed, lanes=self._lanes, run=self._run, block=self.block
        )

    def place(self, number: int) -> tuple[int, int]:
        """Part and row of a sample."""
        number = int(number)
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no sample {number} of {len(self)}")
        number %= len(self)
        part = int(np.searchsorted(self._ends, number, side="right"))
        return part, number - int(self._ends[part] - self.counts[part])

    def file(self, number: int) -> Any:
        """An open shard, one of the latest ``OPEN``; each process opens its own.

        Raises:
            TrainingError: it is not the file that was indexed.
        """
        if self._process != os.getpid():  # forked: what is open is the parent's
            self.forget()
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        name, size = self.index.path(number), self.index.files[number][1]
        try:
            file = open_shard(name)
        except ConfigError as error:
            raise TrainingError(str(error)) from error
        if (found := bytes_of(file)) != size:
            file.close()
            raise TrainingError(
                f"the shard {name} has {found} bytes, and had {size} when it was indexed: write "
                f"the index {self.index.prefix} again with drivetrain data index"
            )
        self._files[number] = self._opened(file, name)
        if len(self._files) > OPEN:
            self._files.popitem(last=False)
        return self._files[number]

    def _opened(self, file: Any, name: str) -> Any:
        """What is kept of an open shard."""
        return file

    def forget(self) -> None:
        """Close nothing, but open everything again: for a process that was forked."""
        self._files, self._process = OrderedDict(), os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}
