"""The comparison with plain torch beside ZeRO, offload, recomputation and kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_zero.shards.gradients import ReduceScatterBucket
from drivetrain_zero.shards.whole import GatheredWhole
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.testing import RanksFailedError, run_distributed

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(torch.tanh(self.layer(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embedding.weight  # tied

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(
            self.head(x[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )


def trained(keys: dict[str, Any], *, lose: bool = False) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "verify": {"steps": 2},
        **keys,
    }
    model = Model()
    engine = drivetrain.initialize(model=model, config=config)[0]
    if lose:  # the second micro-batch's part of one bucket
        right = ReduceScatterBucket._keep_sum

        def keep(self: ReduceScatterBucket, result: torch.Tensor) -> None:
            if "blocks.1" in self.key and self._has_sum:
                result = torch.zeros_like(result)
            right(self, result)

        ReduceScatterBucket._keep_sum = keep  # type: ignore[method-assign]
    for step in range(3):
        for micro in range(2):
            seed = 100 * step + 10 * micro + engine.job.rank
            tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(seed))
            engine.backward(engine(tokens))
            engine.step()
    from drivetrain_verify.work import _works

    assert _works[engine.job].verdict.steps == 2
    engine.destroy()


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    section = {"stage": stage, "stage3_param_persistence_threshold": 0, **keys}
    return {"zero_optimization": section}


HOST = {"device": "cpu"}


@pytest.mark.parametrize(
    "keys",
    [
        zero(1),
        zero(2, offload_optimizer=HOST),
        zero(3),
        {**zero(3, offload_optimizer=HOST, offload_param=HOST), "bf16": {"enabled": True}},
        {"activation_checkpointing": {"recompute": "all"}},
    ],
    ids=["stage1", "stage2-host", "stage3", "stage3-host-bf16", "recompute"],
)
def test_plans_of_other_packages_agree_with_plain_torch(keys: dict[str, Any]) -> None:
    run_distributed(trained, 2, keys)


def test_states_in_files_agree_with_plain_torch(tmp_path: Path) -> None:
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
    run_distributed(trained, 2, zero(2, offload_optimizer=nvme))


def losing(keys: dict[str, Any]) -> None:
    trained(keys, lose=True)


def stale(keys: dict[str, Any]) -> None:
    """One unit is gathered as it was before the first update."""
    right, old = GatheredWhole._complete, {}

    def complete(self: GatheredWhole) -> None:
        arrives = self._handle is not None
        right(self)
        if arrives and "blocks.1" in self._layout.key:
            self.flat.copy_(old.setdefault(id(self), self.flat.clone()))

    GatheredWhole._complete = complete  # type: ignore[method-assign]
    trained(keys)


def test_a_stale_gather_is_found_in_the_step_after() -> None:
    with pytest.raises(
        RanksFailedError, match=r"value in forward of parameter blocks\.1\.\S+ in step 2"
    ):
        run_distributed(stale, 2, zero(3))


def test_a_micro_batch_that_one_shard_loses_is_found() -> None:
    with pytest.raises(RanksFailedError, match=r"gradient of parameter blocks\.1\.norm\.weight"):
        run_distributed(losing, 2, zero(3))


@pytest.mark.parametrize(
    ("keys", "axis"),
    [
        ({"pipeline": {"stages": 2}}, "pp"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tp"),
        ({"sequence_parallel_size": 2}, "sp"),
        ({"expert_parallel": {"enabled": True, "autoep_size": 2}}, "ep"),
        ({"moe": {"ep_size": 2}}, "ep"),
    ],
    ids=["pipeline", "tensor", "sequence", "experts", "experts of layers"],
)
def test_plans_that_share_out_the_model_are_refused_by_name(
    keys: dict[str, Any], axis: str
) -> None:
    from drivetrain.plan.plan import Plan

    config = {"train_micro_batch_size_per_gpu": 1, "verify": {}, **keys}
    words = rf"verify\.enabled: compares data-parallel plans: .* shares out {axis} "
    with pytest.raises(ConfigError, match=words):
        Plan.build(config, world_size=2)


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_plans_that_round_on_purpose_are_refused_by_name(key: str) -> None:
    from drivetrain.plan.plan import Plan

    config = {"train_micro_batch_size_per_gpu": 1, "verify": {}, **zero(3, **{key: True})}
    with pytest.raises(ConfigError, match=rf"zero_optimization\.{key} rounds far more"):
        Plan.build(config, world_size=2)
