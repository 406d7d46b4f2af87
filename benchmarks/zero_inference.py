"""Generate with weights several times the memory that the process may have: they lie in files.

    python benchmarks/zero_inference.py --folder /path/on/the/disk

A random Llama is written as safetensors. A process in a memory control group of its own (cgroup v1
or v2, which takes the right to make one) serves it by ZeRO's third stage with ``offload_param`` on
``nvme``: each forward reads every weight, past the page cache. Printed are the bytes of weights
that a forward passes a second, and what the disk gives to the same engine of asynchronous I/O when
nothing is computed, before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HIDDEN, INNER, VOCABULARY = 2048, 5632, 8192


def write_model(folder: Path, layers: int) -> int:
    """Write config and weights, a file a layer; returns the bytes of weights."""
    from safetensors.torch import save_file

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "vocab_size": VOCABULARY,
        "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    parts: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
            "lm_head.weight": (VOCABULARY, HIDDEN),
            "model.norm.weight": (HIDDEN,),
        }
    ]
    key = HIDDEN // 4
    for number in range(layers):
        shapes = {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (key, HIDDEN),
            "self_attn.v_proj": (key, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER), "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }  # fmt: skip
        parts.append({f"model.layers.{number}.{n}.weight": s for n, s in shapes.items()})
    index, total = {}, 0
    for number, part in enumerate(parts):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {n: (0.02 * torch.randn(s)).bfloat16() for n, s in part.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        total += sum(each.numel() * 2 for each in tensors.values())
    whole = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(whole))
    return total


class Limit:
    """A control group whose processes have so many bytes of memory, page cache among them."""

    def __init__(self, size: int) -> None:
        old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        root, name = (old, "memory.limit_in_bytes") if old.is_dir() else (new, "memory.max")
        self._peak = "memory.max_usage_in_bytes" if old.is_dir() else "memory.peak"
        self.folder = root / f"drivetrain_zero_inference_{os.getpid()}"
        self.folder.mkdir()
        (self.folder / name).write_text(str(size))

    def enter(self) -> None:
        """Put this process into it."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        """Most bytes that its processes have had."""
        return int((self.folder / self._peak).read_text())

    def close(self) -> None:
        """Remove it, when its processes have ended."""
        self.folder.rmdir()


def disk_rate(folder: Path, size: int) -> float:
    """GB/s of reading a file of ``size`` bytes by the engine that reads weights."""
    from drivetrain_offload.bench.io_measure import move, scratch_file
    from drivetrain_offload.file_io import IOSettings

    with scratch_file(folder, size) as path:
        move(path, IOSettings(), "write", size, seconds=60.0, passes=1)
        return move(path, IOSettings(), "read", size, seconds=60.0, passes=1)[0].bytes_per_second


def generate(folder: Path, swap: Path, sequences: int, tokens: int, buffers: int) -> dict[str, Any]:
    """Serve the model and time forwards in which each of ``sequences`` gets one token."""
    from drivetrain_inference import SamplingParams, serve

    began = time.perf_counter()
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "offload_param": {
            "device": "nvme", "nvme_path": str(swap), "max_in_cpu": 0, "buffer_count": buffers,
        },
    }  # fmt: skip
    section = {"fast_path": "never", "max_context": 256, "max_sequences": sequences}
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero,
        "inference": {**section, "cache_bytes": 2**26},
    }  # fmt: skip
    with serve(folder, config, weights=folder, dtype=torch.bfloat16) as engine:
        ready = time.perf_counter() - began
        params = SamplingParams(max_new_tokens=tokens + 2, ignore_eos=True)
        for number in range(sequences):
            engine.add([number + 5] * 8, params)
        engine.step()  # the prompts
        steps = []
        for _ in range(tokens):
            start = time.perf_counter()
            engine.step()
            steps.append(time.perf_counter() - start)
    return {"ready_seconds": round(ready, 1), "step_seconds": statistics.median(steps)}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--share", type=float, default=4.0, help="weights over memory")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--buffers", type=int, default=2)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model, swap = options.folder / "model", options.folder / "swap"
    if options.inside:
        found = generate(model, swap, options.sequences, options.tokens, options.buffers)
        print(json.dumps(found))
        return
    weights = write_model(model, options.layers)
    limit = Limit(int(weights / options.share))
    command = [sys.executable, __file__, *sys.argv[1:], "--inside"]
    try:
        before = disk_rate(options.folder, 2**31)
        done = subprocess.run(command, preexec_fn=limit.enter, stdout=subprocess.PIPE, text=True)
        after = disk_rate(options.folder, 2**31)
        peak = limit.peak()
    finally:
        limit.close()
        shutil.rmtree(options.folder, ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"the process in the group has ended with {done.returncode}")
    found = json.loads(done.stdout)
    rate, disk = weights / found["step_seconds"] / 1e9, min(before, after)
    report = {
        "weights_mb": round(weights / 1e6), "limit_mb": round(weights / options.share / 1e6),
        "peak_mb": round(peak / 1e6), **found, "weights_gb_per_second": round(rate, 3),
        "disk_gb_per_second": [round(before, 3), round(after, 3)],
        "share_of_disk": round(rate / disk, 3),
        "tokens_per_second": round(options.sequences / found["step_seconds"], 3),
    }  # fmt: skip
    print(json.dumps({"zero_inference": report}, indent=1))


if __name__ == "__main__":
    main()
