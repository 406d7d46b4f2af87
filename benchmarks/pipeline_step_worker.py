"""One stage of one system of ``pipeline_step.py``: builds it, then takes a step whenever told.

A system may have a cut behind its schedule: ``1f1b/5`` has five blocks in the first part (torch,
two parts), and ``1f1b/measured`` cuts by times that it measures in its first step (drivetrain).
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

sys.path.append(str(Path(__file__).parent))  # behind what is installed

from train_step_worker import GPT, LEARNING_RATE, Batches

Pair = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[list[Pair]], torch.Tensor]
"""Micro-batches of a step -> its mean loss, where the stage knows it."""

DECAY = 0.01


class Decoder(GPT):
    """The GPT, calling each of its parts as a module."""

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            x = block(x)
        return loss_of(self.head(self.norm(x)), targets)


class First(nn.Module):
    """The embeddings of a GPT."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.tokens, self.positions = model.tokens, model.positions

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
        return found


class Last(nn.Module):
    """The norm and head of a GPT."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.norm, self.head = model.norm, model.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.norm(x))
        return found


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean loss of a micro-batch."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def chunks_of(model: GPT, count: int, first: int | None = None) -> list[list[nn.Module]]:
    """A GPT's layers, its blocks in equal numbers, or ``first`` in the first of two parts."""
    blocks = list(model.blocks)
    bounds = [round(len(blocks) * part / count) for part in range(count + 1)]
    if first is not None:
        bounds = [0, first, len(blocks)]
    found: list[list[nn.Module]] = [blocks[a:b] for a, b in pairwise(bounds)]
    found[0].insert(0, First(model))
    found[-1].append(Last(model))
    return found


def torch_pipelining(model: GPT, shape: dict[str, Any], schedule: str) -> Step:
    """torch.distributed.pipelining, and AdamW on the stage's parameters."""
    from torch.distributed import pipelining

    kinds: dict[str, tuple[Any, int]] = {
        "1f1b": (pipelining.Schedule1F1B, 1),
        "gpipe": (pipelining.ScheduleGPipe, 1),
        "interleaved": (pipelining.ScheduleInterleaved1F1B, 2),
        "zb": (pipelining.ScheduleInterleavedZeroBubble, 2),
    }
    name, _, first = schedule.partition("/")
    kind, each = kinds[name or "1f1b"]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    chunks = chunks_of(model, ranks * each, int(first) if first else None)
    stages = [
        pipelining.PipelineStage(nn.Sequential(*chunks[c]), c, len(chunks), torch.device("cpu"))
        for c in range(rank, len(chunks), ranks)
    ]
    runs = kind(
        stages[0] if each == 1 else stages, n_microbatches=shape["micro_batches"], loss_fn=loss_of
    )
    parameters = [p for stage in stages for p in stage.submod.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=DECAY, fused=True)

    def step(pairs: list[Pair]) -> torch.Tensor:
        inputs, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        losses: list[torch.Tensor] = []
        last = {"target": targets, "losses": losses} if rank == ranks - 1 else {}
        runs.step(*([inputs] if rank == 0 else []), **last)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean() if losses else torch.zeros(())

    return step


def drivetrain(model: GPT, shape: dict[str, Any], schedule: str) -> Step:
    """The pipeline plugin, on the model as it is."""
    import drivetrain as library

    name, _, cut = schedule.partition("/")
    section: dict[str, Any] = {"stages": dist.get_world_size(), "schedule": name or "1f1b"}
    engines: list[Any] = []

    def build() -> Any:
        how = {"partition": "type:Block"}
        if cut == "measured":
            how = {"partition": "measured", "measured": _measured(model, shape)}
        config = {**_config(shape), "pipeline": {**section, **how}}
        engine, *_ = library.initialize(model=model, config=config)
        bounds = engine.module.drivetrain_chunks.partitions()
        print(f"{schedule or name}: blocks are cut at {bounds}")  # goes to stderr
        return engine

    def step(pairs: list[Pair]) -> torch.Tensor:
        if not engines:  # not before it is this system's turn, or others would disturb the times
            engines.append(build())
        loss: torch.Tensor = engines[0].train_batch(iter(pairs))
        return loss

    return step


def _measured(model: GPT, shape: dict[str, Any]) -> str:
    """The file with times of a copy of the model, in a pipeline that is cut evenly."""
    from drivetrain_pipeline import measure

    import drivetrain as library

    def endless() -> Iterator[Pair]:
        batches = Batches(shape, 1)
        while True:
            yield batches.next()

    section = {"stages": dist.get_world_size(), "partition": "uniform"}
    config = {**_config(shape), "pipeline": section}
    engine, *_ = library.initialize(model=copy.deepcopy(model), config=config)
    path = Path(tempfile.gettempdir()) / f"pipeline-step-{os.environ['MASTER_PORT']}.json"
    measure(engine, endless(), path, steps=4)
    engine.destroy()
    engine.job.close()
    return str(path)


def deepspeed(model: GPT, shape: dict[str, Any], schedule: str) -> Step:
    """DeepSpeed's pipeline engine, or the drop-in where that is installed, with torch's AdamW."""
    import deepspeed as library
    from deepspeed.pipe import PipelineModule

    layers = [layer for chunk in chunks_of(model, 1) for layer in chunk]
    library.init_distributed("gloo")
    module = PipelineModule(
        layers, num_stages=dist.get_world_size(), loss_fn=loss_of, partition_method="type:Block"
    )
    engine, *_ = library.initialize(
        model=module,
        model_parameters=[p for p in module.parameters() if p.requires_grad],
        config=_config(shape),
    )

    def endless(pairs: list[Pair]) -> Iterator[Pair]:
        yield from pairs

    def step(pairs: list[Pair]) -> torch.Tensor:
        loss: torch.Tensor = engine.train_batch(endless(pairs))
        return loss

    return step


def _config(shape: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": shape["micro_batch"],
        "gradient_accumulation_steps": shape["micro_batches"],
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "weight_decay": DECAY, "torch_adam": True},
        },
        "steps_per_print": 1_000_000,
    }


SYSTEMS: dict[str, Callable[[GPT, dict[str, Any], str], Step]] = {
    "torch": torch_pipelining,
    "drivetrain": drivetrain,
    "deepspeed": deepspeed,
}


def main() -> None:
    name, _, schedule = sys.argv[1].partition(":")
    shape = json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not be taken for an answer
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    step = SYSTEMS[name](Decoder(shape), shape, schedule)
    batches = Batches(shape, 0)  # every stage sees the same

    def answer(**facts: object) -> None:
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    answer(torch=torch.__version__)
    loss, busy = torch.zeros(()), []
    for line in sys.stdin:
        if line.strip() == "end":
            break
        begin = time.process_time()
        loss = step([batches.next() for _ in range(shape["micro_batches"])])
        busy.append(time.process_time() - begin)
        answer()
    mean = loss.detach().clone().double()
    if name == "torch":  # only the last stage knows it
        dist.broadcast(mean, dist.get_world_size() - 1)
    # Of all threads, for busy machines; the longest says what no order of passes can go below.
    processor: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(processor, round(statistics.median(busy), 5))
    answer(last_loss=round(float(mean), 6), processor_seconds_of_stages=processor)
    Path(tempfile.gettempdir(), f"pipeline-step-{os.environ['MASTER_PORT']}.json").unlink(True)
    answers.close()
    os._exit(0)  # groups of several systems end in any order; nothing is left to save


if __name__ == "__main__":
    main()
