"""Each modifier in training with each stage of ZeRO and precision, pairwise: as at stage 0."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairs import all_pairs

import drivetrain
from drivetrain.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "compression" / "tests"))

from compressed_models import ConvNet, batches, group, method, net
from drivetrain_compression import init_compression, redundancy_clean

STEPS, RANKS = 4, 2
NOW = {"schedule_offset": 0}


def bits(least: int, **shared: Any) -> dict[str, Any]:
    schedule = {"start_bits": max(least, 4), "target_bits": least, "quantization_period": 1}
    groups = {"g": group(["up", "embed"], **schedule)}
    return {"weight_quantization": method({**NOW, "quantize_groups": 2, **shared}, groups)}


UP = {"g": group([r"\.up"], [[r"\.down"]], dense_ratio=0.5)}
HEADS = {"g": group(["output"], [["query", "key", "value"]], dense_ratio=0.5)}
BLOCKS = {
    "enabled": True, "method": "snip_momentum", "block_pattern": "4x1", "dense_ratio": 0.5,
    "schedule_offset": 1, "schedule_offset_end": 3, "excluded_modules": ["head"],
}  # fmt: skip
STATIC = method({**NOW, "range_calibration": "static"}, {"g": group(["down"], bits=8)})
CHANNELS = {"g": group(["conv1"], [["bn1", "conv2"]], dense_ratio=0.5)}
SECTIONS: dict[str, dict[str, Any]] = {
    "falling bits": bits(3),
    "binary": bits(1),
    "ternary": bits(2),
    "mixed with exact": bits(4, fp16_mixed_quantize={"enabled": True}),
    "inputs": {"activation_quantization": method(NOW, {"g": group(["down"], bits=8)})},
    "static inputs": {"activation_quantization": STATIC},
    "zeros": {"sparse_pruning": method(NOW, {"g": group(["query"], dense_ratio=0.4)})},
    "learned zeros": {
        "sparse_pruning": method(
            {**NOW, "method": "topk"}, {"g": group([r"\.key"], dense_ratio=0.5)}
        )
    },
    "blocks": {"sparse_pruning": BLOCKS},
    "rows": {"row_pruning": method({"schedule_offset": 2}, UP)},
    "heads": {"head_pruning": method({**NOW, "num_heads": 2, "method": "topk"}, HEADS)},
    "channels": {"channel_pruning": method(NOW, CHANNELS)},
    "a teacher": {
        "layer_reduction": {
            "enabled": True, "module_name_prefix": "layers", "teacher_layer": [0, 2],
            "other_module_name": ["embed", "head"],
        },
        "distillation": {"enabled": True, "terms": [{"student": "head", "loss": "kl"}]},
    },
}  # fmt: skip
ROWS = list(
    all_pairs(
        {
            "modifier": list(SECTIONS),
            "stage": [0, 1, 2, 3],
            "precision": ["fp64", "bf16", "fp16"],
            "accumulation": [1, 2],
            "again": ["", "all"],  # activations, computed again in backward
        }
    )
)


class Pictures(ConvNet):
    """``forward(images, labels)`` is the loss."""

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(super().forward(images), labels)


def begun(row: dict[str, Any]) -> Any:
    torch.manual_seed(5)
    model = Pictures().double() if row["modifier"] == "channels" else net()
    section = {"compression_training": SECTIONS[row["modifier"]]}
    if row["modifier"] == "a teacher":
        teacher = net(layers=3)
        for each in (model, teacher) if row["precision"] != "fp64" else ():
            each.float()
        return init_compression(model, section, teacher_model=teacher)
    return model if row["precision"] == "fp64" else model.float()


def settings(row: dict[str, Any], stage: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": row["accumulation"],
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "compression_training": SECTIONS[row["modifier"]],
    }
    if row["precision"] != "fp64":
        config[row["precision"]] = {"enabled": True}
    if row["precision"] == "fp16":
        config["fp16"] |= {"loss_scale": 64}
    if row["again"]:
        config["activation_checkpointing"] = {"recompute": row["again"]}
    return config


def data(row: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    many = STEPS * row["accumulation"] * RANKS
    if row["modifier"] != "channels":
        return batches(many)
    generator = torch.Generator().manual_seed(9)
    dtype = torch.float64 if row["precision"] == "fp64" else torch.float32
    return [
        (
            torch.randn(4, 3, 4, 4, generator=generator, dtype=dtype),
            torch.randint(5, (4,), generator=generator),
        )
        for _ in range(many)
    ]


def trained(row: dict[str, Any], stage: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and what is left of the model when it is cleaned."""
    engine = drivetrain.initialize(model=begun(row), config=settings(row, stage))[0]
    losses = []
    for given, wanted in data(row)[engine.job.rank :: RANKS]:
        loss = engine(given, wanted)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    model = engine.module
    engine.destroy()
    state = redundancy_clean(model).state_dict()
    return losses, {name: value.detach().clone() for name, value in state.items()}


def pairs_of_runs() -> list[Any]:
    found = []
    for row in ROWS:
        whole = trained(row, 0)
        found.append((whole, trained(row, row["stage"]) if row["stage"] else whole))
    return found


@pytest.mark.long
def test_every_modifier_trains_at_every_stage_and_precision_as_at_stage_0() -> None:
    for rank in run_distributed(pairs_of_runs, RANKS, timeout=600):
        for row, ((losses, state), (others, sharded)) in zip(ROWS, rank, strict=True):
            exact = row["precision"] == "fp64"
            assert others == pytest.approx(losses, rel=1e-6 if exact else 3e-2), row
            assert {n: v.shape for n, v in state.items()} == {
                n: v.shape for n, v in sharded.items()
            }, row
            if exact:
                for name, value in state.items():
                    torch.testing.assert_close(
                        sharded[name], value, rtol=1e-6, atol=1e-7,
                        msg=lambda m, row=row, name=name: f"{row} {name}: {m}",
                    )  # fmt: skip
