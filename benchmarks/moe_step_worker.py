"""One rank of one system of ``moe_step.py``: builds it, then takes a step whenever told."""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

Step = Callable[[], torch.Tensor]


class Expert(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Layers(nn.Module):
    """Layers that are nothing but mixtures of experts, made by ``make(expert)``."""

    def __init__(self, shape: dict[str, Any], make: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        width, inner = shape["width"], shape["inner"]
        self.layers = nn.ModuleList(make(Expert(width, inner)) for _ in range(shape["layers"]))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(shape["layers"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        balance = x.new_zeros(())
        for norm, layer in zip(self.norms, self.layers, strict=True):
            out, aux, _ = layer(norm(x))
            x, balance = x + out, balance + aux
        return x.square().mean() + 0.01 * balance


def config(shape: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": shape["batch"],
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": shape["rate"]}},
        **({"cpu": {"shared_memory": False}} if shape.get("mbit") else {}),
        **more,
    }


def stepping(engine: Any, loss_of: Callable[[Any], torch.Tensor]) -> Step:
    def step() -> torch.Tensor:
        loss = loss_of(engine)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def hidden(shape: dict[str, Any]) -> torch.Tensor:
    return torch.randn(shape["batch"], shape["sequence"], shape["width"])


def drivetrain_layer(shape: dict[str, Any], ep: int) -> Step:
    from drivetrain_moe import MoE

    import drivetrain

    width, count, k = shape["width"], shape["experts"], shape["k"]
    model = Layers(shape, lambda e: MoE(width, e, count, ep, k, min_capacity=4))
    engine = drivetrain.initialize(model=model, config=config(shape))[0]
    return stepping(engine, lambda engine: engine(hidden(shape)))


def drivetrain_halves(shape: dict[str, Any], ep: int) -> Step:
    """Tokens travel in two halves."""
    from drivetrain_moe import MoE

    import drivetrain

    width, count, k = shape["width"], shape["experts"], shape["k"]
    model = Layers(shape, lambda e: MoE(width, e, count, ep, k, min_capacity=4))
    own = config(shape, moe={"halves": True})
    engine = drivetrain.initialize(model=model, config=own)[0]
    return stepping(engine, lambda engine: engine(hidden(shape)))


def drivetrain_shared(shape: dict[str, Any], ep: int, *, inside: bool = True) -> Step:
    """Each layer has a shared expert, twice as wide as others; it computes while tokens travel."""
    from drivetrain_moe import MoE

    import drivetrain

    class Beside(nn.Module):
        def __init__(self, layer: nn.Module, expert: nn.Module) -> None:
            super().__init__()
            self.layer, self.expert = layer, expert

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            out, *rest = self.layer(x)
            return out + self.expert(x), *rest

    width, count, k = shape["width"], shape["experts"], shape["k"]

    def make(expert: nn.Module) -> nn.Module:
        shared = Expert(width, 2 * shape["inner"])
        options = {"min_capacity": 4, "shared_expert": shared if inside else None}
        layer = MoE(width, expert, count, ep, k, **options)
        return layer if inside else Beside(layer, shared)

    engine = drivetrain.initialize(model=Layers(shape, make), config=config(shape))[0]
    return stepping(engine, lambda engine: engine(hidden(shape)))


def deepspeed_layer(shape: dict[str, Any], ep: int) -> Step:
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    deepspeed.init_distributed("gloo")
    width, count, k = shape["width"], shape["experts"], shape["k"]
    model = Layers(shape, lambda e: MoE(width, e, count, ep, k))
    groups = split([{"params": list(model.parameters()), "name": "parameters"}])
    optimizer = torch.optim.AdamW(groups, lr=shape["rate"])
    own = config(shape)
    del own["optimizer"]
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=own)[0]
    return stepping(engine, lambda engine: engine(hidden(shape)))


def mixtral(shape: dict[str, Any]) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=shape["vocabulary"],
            hidden_size=shape["width"],
            intermediate_size=shape["inner"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=8,
            num_key_value_heads=8,
            num_local_experts=shape["experts"],
            num_experts_per_tok=shape["k"],
            use_cache=False,
        )
    ).train()


def words(shape: dict[str, Any]) -> torch.Tensor:
    return torch.randint(0, shape["vocabulary"], (shape["batch"], shape["sequence"]))


def transformers_ddp(shape: dict[str, Any], _ep: int) -> Step:
    model = nn.parallel.DistributedDataParallel(mixtral(shape), find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape["rate"])

    def step() -> torch.Tensor:
        ids = words(shape)
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def transformers_fsdp2(shape: dict[str, Any], _ep: int) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = mixtral(shape)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape["rate"])

    def step() -> torch.Tensor:
        ids = words(shape)
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def drivetrain_mixtral(shape: dict[str, Any], ep: int) -> Step:
    import drivetrain

    experts = {"expert_parallel": {"enabled": True, "autoep_size": ep}}
    engine = drivetrain.initialize(model=mixtral(shape), config=config(shape, **experts))[0]

    def loss_of(engine: Any) -> torch.Tensor:
        ids = words(shape)
        loss: torch.Tensor = engine(input_ids=ids, labels=ids).loss
        return loss

    return stepping(engine, loss_of)


SYSTEMS: dict[str, Callable[[dict[str, Any], int], Step]] = {
    "drivetrain-layer": drivetrain_layer,
    "drivetrain-halves": drivetrain_halves,
    "drivetrain-shared": drivetrain_shared,
    "drivetrain-beside": partial(drivetrain_shared, inside=False),
    "deepspeed-layer": deepspeed_layer,
    "transformers-ddp": transformers_ddp,
    "transformers-fsdp2": transformers_fsdp2,
    "drivetrain-mixtral": drivetrain_mixtral,
}


def main() -> None:
    name, _, ep = sys.argv[1].partition(":")
    shape = json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not be taken for an answer
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    step = SYSTEMS[name](shape, int(ep or 1))

    def answer(**facts: object) -> None:
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    answer(torch=torch.__version__)
    loss, processor = torch.zeros(()), list[float]()
    for line in sys.stdin:
        if line.strip() == "end":
            break
        begin = time.process_time()
        loss = step()
        processor.append(time.process_time() - begin)
        answer()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    by_rank: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(by_rank, round(statistics.median(processor or [0.0]), 5))
    answer(
        last_loss=round(float(loss), 5),
        peak_resident_mib=peak,
        processor_seconds_of_ranks=by_rank,
    )
    answers.close()
    os._exit(0)


if __name__ == "__main__":
    main()
