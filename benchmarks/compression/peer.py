"""What llm-compressor makes of the same model with the same data; runs where it is installed.

    PEER_PYTHON benchmarks/compression/peer.py FOLDER --out RESULTS --method gptq-64

Written for llm-compressor 0.14. Recipes are those of ``table.py``: symmetric, groups, minimum and
maximum as ranges, unless the recipe of llm-compressor has its own. Writes one file of figures into
RESULTS.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def grouped(group: int) -> dict[str, Any]:
    """Symmetric weights of 4 bits in all layers but the head."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}


def recipe(name: str) -> list[Any]:
    """Modifiers of llm-compressor."""
    if name in ("gptq-64", "gptq-128"):
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(**grouped(int(name.partition("-")[2])))]
    if name == "awq-64":
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        return [AWQModifier(), QuantizationModifier(**grouped(64))]
    if name == "sparsegpt-2:4":
        from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier

        return [
            SparseGPTModifier(
                sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["lm_head"]
            )
        ]
    if name == "w8a8":
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        return [
            SmoothQuantModifier(smoothing_strength=0.5),
            GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ]
    raise SystemExit(f"no recipe {name}")


def perplexity(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """As in ``model.py``, which needs packages that are not here."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in rows.split(4):
            logits = model(input_ids=row).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten())
            total, count = total + float(loss) * row[:, 1:].numel(), count + row[:, 1:].numel()
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--held", type=int, default=24)
    options = parser.parse_args()
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = load_file(options.folder / "rows")
    ids = rows["calibration"][: options.samples, : options.length]
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)
    ]
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16)
    made = recipe(options.method)
    began, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(options.folder),
        dataset=DataLoader(batches, batch_size=None),
        recipe=made,
        num_calibration_samples=len(batches),
    )
    found = {
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - cpu,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "perplexity": perplexity(model, rows["held"][: options.held]),
        "samples": options.samples, "length": options.length, "held": options.held,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"peer-{options.method}.json").write_text(json.dumps(found), "utf-8")
    print(options.method, found)


if __name__ == "__main__":
    main()
