"""Train a small Llama over bytes, and serve its checkpoint: python examples/serve_trained.py

What is left in the folder is a config and a tokenizer of Transformers, and a checkpoint of
Drivetrain; ``drivetrain serve`` reads the one for what the model is, and the other for its values.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from text_data import standard_library
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import drivetrain

END, START = "<|end|>", "<|start|>"
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
CONTEXT = 512


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, after two special ones; a chat is its messages, line by line."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(BPE({word: n for n, word in enumerate([END, START, *letters])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, chat_template=TEMPLATE)


def train(folder: Path, steps: int, layers: int, width: int) -> None:
    """Train on the sources of Python's standard library, and leave everything in ``folder``."""
    words = byte_tokenizer()
    text = standard_library()[:4_000_000].decode("utf-8", errors="ignore")
    tokens = torch.tensor(words(text)["input_ids"])
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=words.eos_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    settings = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3}},
        "gradient_clipping": 1.0,
    }
    engine, *_ = drivetrain.initialize(model=LlamaForCausalLM(config), config=settings)
    for step in range(steps):
        starts = torch.randint(len(tokens) - 129, (8,)).tolist()
        batch = torch.stack([tokens[start : start + 128] for start in starts])
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        if step % 25 == 0:
            print(f"step {step}: loss {float(loss):.3f}")
    config.save_pretrained(folder)
    words.save_pretrained(folder)
    engine.save_checkpoint(folder / "checkpoints")


def main() -> None:
    """Train if the folder has no checkpoint, then serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/serve_trained"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--port", default="8000")
    options = parser.parse_args()
    checkpoints = options.out / "checkpoints"
    if not checkpoints.exists():
        train(options.out, options.steps, options.layers, options.width)
    command = [sys.executable, "-m", "drivetrain.cli", "serve", str(options.out)]
    command += ["--weights", str(checkpoints), "--port", options.port]
    try:
        raise SystemExit(subprocess.run(command, check=False).returncode)
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    main()
