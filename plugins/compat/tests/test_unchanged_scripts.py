"""Scripts for DeepSpeed run as they are, with the losses of torch's own data parallelism."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from drivetrain.testing import run_distributed

SCRIPTS = Path(__file__).parent / "scripts"

CONFIG = {
    "train_batch_size": 8,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 0.01}},
    "fp16": {"enabled": False, "loss_scale": 0},
    "zero_optimization": {"stage": 1},
}


def on_a_rank(name, arguments):
    """Losses of a script and of DistributedDataParallel, in the same process."""
    sys.path.insert(0, str(SCRIPTS))
    sys.argv = [name, *arguments]
    found = runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    engine = found["engine"]
    seen = [] if found.get("loader") is None else order(engine)
    reference = REFERENCES[name](engine.global_rank, seen)
    engine.destroy()
    return found["losses"], reference


def order(engine):
    """The batches that the script's loader gave: a new one of the same job gives them again."""
    loader = engine.deepspeed_io(engine.training_dataloader.dataset)
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs += list(loader)
    return epochs


def train(model, optimizer, batches, *, accumulate=1, clip=None, schedule=None):
    """A plain loop; returns mean losses over the two ranks."""
    losses = []
    for number, (inputs, labels) in enumerate(batches, 1):
        loss = cross_entropy(model(inputs), labels)
        (loss / accumulate).backward()
        if number % accumulate == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / 2)
    return losses


def net(frozen=()):
    from data import Net

    torch.manual_seed(0)
    model = Net()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return DistributedDataParallel(model)


def lambdas(optimizer, function):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, function)


def classify(rank, seen):
    import math

    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    # As in DeepSpeed, the schedule's count begins with the second update.
    warm = lambdas(optimizer, lambda n: min(1.0, math.log(max(n, 1)) / math.log(5)))
    return train(model, optimizer, seen, schedule=warm)


def shard(rank, seen):
    from data import batches

    model = net()
    return train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(rank, 4))


def offload(rank, seen):
    from data import batches

    model = net()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    falling = lambdas(optimizer, lambda n: 1 / (n + 1))
    return train(model, optimizer, batches(rank, 6), accumulate=2, schedule=falling)


def whole_batches(rank, seen):
    model = net(frozen=["first.bias"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.2, momentum=0.9)
    rising = lambdas(optimizer, lambda n: min(1.0, max(n - 1, 0) / 3))
    return train(model, optimizer, seen[:6], schedule=rising)


def accumulate(rank, seen):
    from data import batches

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return train(model, optimizer, batches(rank, 6), accumulate=3, clip=0.05)


REFERENCES = {
    "classify": classify,
    "shard": shard,
    "offload": offload,
    "batches": whole_batches,
    "accumulate": accumulate,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_script_for_deepspeed_trains_as_plain_ddp_does(name, tmp_path):
    arguments = []
    if name == "classify":
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        arguments = ["--deepspeed", "--deepspeed_config", str(tmp_path / "config.json")]
    for losses, reference in run_distributed(on_a_rank, 2, name, arguments):
        assert len(losses) >= 4
        assert losses[0] != losses[-1]
        assert losses == pytest.approx(reference, rel=2e-5)
