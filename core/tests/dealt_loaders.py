"""Loaders of all shards in one process, and streams for them."""

from torch.utils.data import IterableDataset

from drivetrain.contracts import LoaderRequest
from drivetrain.engine.loader import DataLoader


class Stream(IterableDataset):
    """Numbers from 0."""

    def __init__(self, size):
        self.size = size
        self.epochs = []

    def __iter__(self):
        return iter(range(self.size))

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


class OwnShards(Stream):
    """Yields every count-th number itself."""

    def set_shard(self, index, count):
        self.index, self.count = index, count

    def __iter__(self):
        return iter(range(self.index, self.size, self.count))


class OwnState(Stream):
    """Knows its position and says what it has read."""

    def __init__(self, size):
        super().__init__(size)
        self.position = 0
        self.read = []

    def __iter__(self):
        while self.position < self.size:
            self.position += 1
            self.read.append(self.position - 1)
            yield self.position - 1
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def shards(dataset, count, batch_size, **options):
    return [
        DataLoader(
            LoaderRequest(
                dataset,
                batch_size,
                collate_fn=list,
                shard=shard,
                num_shards=count,
                **options,
            )
        )
        for shard in range(count)
    ]


def rounds(loaders):
    """One epoch on all shards: for every round, all samples of all shards."""
    epochs = [list(loader) for loader in loaders]
    assert len({len(epoch) for epoch in epochs}) == 1
    for batches in zip(*epochs, strict=True):
        assert len({len(batch) for batch in batches}) == 1
    return [flatten(batches) for batches in zip(*epochs, strict=True)]


def flatten(lists):
    return [sample for batch in lists for sample in batch]
