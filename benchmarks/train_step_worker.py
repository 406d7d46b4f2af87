"""One rank of one system of ``train_step.py``: builds it, then takes a step whenever told."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

Step = Callable[[], torch.Tensor]

LEARNING_RATE = 1e-4


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, sequence, width = x.shape
        q, k, v = (
            self.qkv(self.norm1(x)).view(batch, sequence, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, sequence, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Decoder-only language model with its loss."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width = shape["width"]
        self.tokens = nn.Embedding(shape["vocabulary"], width)
        self.positions = nn.Embedding(shape["sequence"], width)
        self.blocks = nn.ModuleList(Block(width, shape["heads"]) for _ in range(shape["layers"]))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, shape["vocabulary"], bias=False)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(inputs) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Batches:
    """Random micro-batches, different on every rank, the same for every system."""

    def __init__(self, shape: dict[str, Any], rank: int) -> None:
        self._shape = shape
        self._generator = torch.Generator().manual_seed(1 + rank)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        size = (self._shape["micro_batch"], self._shape["sequence"] + 1)
        tokens = torch.randint(self._shape["vocabulary"], size, generator=self._generator)
        return tokens[:, :-1], tokens[:, 1:]


def ddp(model: nn.Module, shape: dict[str, Any], batches: Batches) -> Step:
    """A hand-written torch loop; in bf16 with fp32 masters, as one writes it by hand."""
    low = shape["dtype"] == "bf16"
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()] if low else []
    if low:
        model = model.to(torch.bfloat16)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(masters or parameters, lr=LEARNING_RATE, fused=True)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    count = shape["accumulation"]

    def step() -> torch.Tensor:
        for index in range(count):
            wrapped.require_backward_grad_sync = index == count - 1
            loss = wrapped(*batches.next())
            (loss / count).backward()
        if low:
            for master, parameter in zip(masters, parameters, strict=True):
                master.grad = parameter.grad.float()
        if shape["clipping"]:
            nn.utils.clip_grad_norm_(masters or parameters, shape["clipping"])
        optimizer.step()
        if low:
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
        model.zero_grad()
        return loss.detach()

    return step


def drivetrain(
    model: nn.Module, shape: dict[str, Any], batches: Batches, stage: int = 0, homes: str = ""
) -> Step:
    """The engine, with replicated states at stage 0."""
    import drivetrain as library

    config = {"zero_optimization": {"stage": stage, **_offload(shape, homes)}} if stage else {}
    return _engine_loop(library.initialize, model, shape, batches, config)


def deepspeed(
    model: nn.Module, shape: dict[str, Any], batches: Batches, stage: int = 0, homes: str = ""
) -> Step:
    """DeepSpeed's engine, with its own CPU Adam where it offloads.

    Elsewhere it has torch's AdamW, so that nothing has to be compiled.
    """
    import deepspeed as library

    config = {
        "zero_optimization": {"stage": stage, **_offload(shape, homes)},
        "zero_allow_untested_optimizer": True,
    }
    return _engine_loop(library.initialize, model, shape, batches, config, torch_adam=not homes)


def _offload(shape: dict[str, Any], homes: str) -> dict[str, Any]:
    """``host``: states in host memory; ``nvme``: in files; ``nvme-params``: parameters as well.

    ``nvme-small`` is ``nvme-params`` with 8 MiB for tiles, two shards and the next unit.
    """
    section = {"device": "cpu" if homes == "host" else "nvme", "nvme_path": shape["nvme_path"]}
    found: dict[str, Any] = {"offload_optimizer": section} if homes else {}
    if homes in ("nvme-params", "nvme-small"):
        found["offload_param"] = {**section, "max_in_cpu": 0}
    if homes == "nvme-small":
        found["offload_optimizer"] = {**section, "buffer_size": 262_144, "buffer_count": 4}
        found["offload_param"]["buffer_count"] = 2
        found["stage3_prefetch_bucket_size"] = 1  # the very next unit is read ahead all the same
    return found


def fsdp2(model: nn.Module, shape: dict[str, Any], batches: Batches) -> Step:
    """torch's fully_shard on every block and the root."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    low = shape["dtype"] == "bf16"
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if low else MixedPrecisionPolicy()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    count = shape["accumulation"]

    def step() -> torch.Tensor:
        for _ in range(count):
            loss = model(*batches.next())
            (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _engine_loop(
    initialize: Callable[..., Any],
    model: nn.Module,
    shape: dict[str, Any],
    batches: Batches,
    extra: dict[str, Any],
    *,
    torch_adam: bool = True,
) -> Step:
    config = {
        "train_micro_batch_size_per_gpu": shape["micro_batch"],
        "gradient_accumulation_steps": shape["accumulation"],
        "gradient_clipping": shape["clipping"],
        # The hand-written loop neither looks for overflows nor accumulates in fp32.
        "bf16": {"enabled": shape["dtype"] == "bf16", "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": shape["dtype"]},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "weight_decay": 0.01, "torch_adam": torch_adam},
        },
        **extra,
    }
    engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=config)

    def step() -> torch.Tensor:
        for _ in range(shape["accumulation"]):
            loss = engine(*batches.next())
            engine.backward(loss)
            engine.step()
        return loss.detach()

    return step


SYSTEMS: dict[str, Callable[..., Step]] = {
    "ddp": ddp,
    "drivetrain": drivetrain,
    "deepspeed": deepspeed,
    "fsdp2": fsdp2,
}


def _forget_peak() -> None:
    """Have the system count the largest resident set anew, without the set-up."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_of_steps() -> int:
    """Largest resident set since then, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def main() -> None:
    name, _, setting = sys.argv[1].partition(":")
    stage, _, homes = setting.partition("+")
    shape = json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not be taken for an answer
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = GPT(shape)
    parameters = sum(p.numel() for p in model.parameters())
    settings = {"stage": int(stage), "homes": homes} if stage else {}
    step = SYSTEMS[name](model, shape, Batches(shape, dist.get_rank()), **settings)

    def answer(**facts: object) -> None:
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    answer(parameters=parameters, torch=torch.__version__)
    _forget_peak()
    loss = torch.zeros(())
    for line in sys.stdin:
        if line.strip() == "end":
            break
        loss = step()
        answer()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    answer(
        last_loss=round(float(loss), 6), peak_resident_mib=peak, peak_of_steps_mib=_peak_of_steps()
    )
    answers.close()
    os._exit(0)  # groups of several systems end in any order; nothing is left to save


if __name__ == "__main__":
    main()
