"""Tiles train a sequence under a limit of memory that plain code does not keep."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

TOKENS, VOCABULARY = 8192, 8192

LIMIT = 384 * 2**20
"""Bytes of data that a process may have beyond those that it has when the model is there: logits
of all tokens take 256 MiB, their log-softmax as much, and a gradient of each in backward."""

TRAIN = f"""
import json, resource, sys, torch, transformers, drivetrain
torch.set_num_threads(1)
config = transformers.LlamaConfig(
    vocab_size={VOCABULARY}, hidden_size=16, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=1, max_position_embeddings={TOKENS},
)
model = transformers.LlamaForCausalLM(config)
engine = drivetrain.initialize(model=model, config={{
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {{"type": "SGD", "params": {{"lr": 0.1}}}},
    **json.loads(sys.argv[1]),
}})[0]
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + {LIMIT},) * 2)
tokens = torch.arange({TOKENS})[None] % {VOCABULARY}
loss = engine(input_ids=tokens, labels=tokens).loss
engine.backward(loss)
engine.step()
print("loss", loss.item())
engine.destroy()
"""


def step(**config: object) -> subprocess.CompletedProcess[str]:
    """One step of training in a process of its own."""
    command = [sys.executable, "-c", TRAIN, json.dumps(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep RLIMIT_DATA")
def test_tiles_train_8192_tokens_where_plain_code_runs_out_of_memory() -> None:
    plain = step()
    assert plain.returncode != 0
    assert "allocate memory" in plain.stderr, plain.stderr
    tiles = step(sequence_parallel={"loss_tile": 512, "mlp_tile": 512})
    assert tiles.returncode == 0, tiles.stderr
    assert tiles.stdout.startswith("loss ")
