"""The model and the data of the scripts, and of what they are compared with."""

import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(5, 8)
        self.last = torch.nn.Linear(8, 3)

    def forward(self, inputs):
        return self.last(torch.tanh(self.first(inputs)))


def samples(count=32):
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(count, 5, generator=generator)
    return inputs, torch.randint(0, 3, (count,), generator=generator)


def dataset():
    return torch.utils.data.TensorDataset(*samples())


def batches(rank, count):
    """Micro-batches of four samples, interleaved over two ranks."""
    inputs, labels = samples(8 * count)
    mine = [slice(8 * n + 4 * rank, 8 * n + 4 * rank + 4) for n in range(count)]
    return [(inputs[part], labels[part]) for part in mine]
