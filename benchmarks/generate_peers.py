"""The requests of ``generate.py`` by other systems, in an environment of theirs.

    OTHER/bin/python -P benchmarks/generate_peers.py vllm --model FOLDER
    OTHER/bin/python -P benchmarks/generate_peers.py llama --model FILE.gguf

``vllm`` takes a folder of safetensors, ``llama`` (llama-cpp-python) a GGUF file. Texts do not end
early. What is printed has the form of ``generate.py``: output tokens per second of one stream, and
of all requests at once; llama.cpp has one stream alone. Nothing of Drivetrain is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any


def requests(number: int) -> list[tuple[list[int], int]]:
    """(prompt, new tokens), as ``generate.py`` draws them."""
    draw = random.Random(0)  # noqa: S311 - the same requests every time
    return [
        (
            [draw.randrange(100, 40000) for _ in range(draw.randrange(64, 583))],
            draw.randrange(24, 129),
        )
        for _ in range(number)
    ]


def vllm(options: argparse.Namespace) -> Callable[[list[tuple[list[int], int]]], float]:
    """Seconds by vLLM."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm as package

    engine = package.LLM(
        model=options.model, dtype=options.dtype, max_model_len=1024, max_num_seqs=64,
        enable_prefix_caching=False, skip_tokenizer_init=True,
        **json.loads(options.options),
    )  # fmt: skip

    def run(work: list[tuple[list[int], int]]) -> float:
        params = [
            package.SamplingParams(
                temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False
            )
            for _, new in work
        ]
        prompts: Any = [{"prompt_token_ids": prompt} for prompt, _ in work]
        began = time.perf_counter()
        results = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert [len(each.outputs[0].token_ids) for each in results] == [new for _, new in work]
        return seconds

    return run


def llama(options: argparse.Namespace) -> Callable[[list[tuple[list[int], int]]], float]:
    """Seconds by llama.cpp, one request after another."""
    import llama_cpp

    engine = llama_cpp.Llama(
        options.model, n_ctx=1024, n_threads=options.threads, n_threads_batch=options.threads,
        verbose=False, **json.loads(options.options),
    )  # fmt: skip

    def run(work: list[tuple[list[int], int]]) -> float:
        began = time.perf_counter()
        for prompt, new in work:
            engine.reset()
            made = zip(range(new), engine.generate(prompt, temp=0.0, reset=True), strict=False)
            assert sum(1 for _ in made) == new
        return time.perf_counter() - began

    return run


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", choices=("vllm", "llama"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=64, help="0: the single stream alone")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens of the single stream")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--options", default="{}", help="more of the system's own, as JSON")
    options = parser.parse_args()
    run = {"vllm": vllm, "llama": llama}[options.system](options)
    run([(list(range(200, 232)), 8)])
    work = {"single": [(requests(1)[0][0][:32], options.tokens)]}
    if options.requests:
        work["many"] = requests(options.requests)
    found = {}
    for name, own in work.items():
        tokens = sum(new for _, new in own)
        speeds = [tokens / run(own) for _ in range(options.pairs)]
        sys.stderr.write(f"{name}: {[round(each, 1) for each in speeds]} tokens/s\n")
        found[name] = round(statistics.median(speeds), 1)
    print(json.dumps({options.system: found}, indent=1))


if __name__ == "__main__":
    main()
