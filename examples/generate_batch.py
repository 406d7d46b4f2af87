"""Continue every line of a file: python examples/generate_batch.py MODEL prompts.txt > out.jsonl

Requests run at once, and each result is written as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from drivetrain_inference import SamplingParams, serve


def main() -> None:
    """Queue all lines, step until they are done, and show how far it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder that save_pretrained has written, or a GGUF file")
    parser.add_argument("prompts", type=Path, help="one prompt a line")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    prompts = options.prompts.read_text("utf-8").splitlines()
    params = SamplingParams(max_new_tokens=options.max_new_tokens)
    done, tokens, began = 0, 0, time.monotonic()
    config = {"inference": {"max_waiting": max(1, len(prompts))}}
    with serve(options.model, config) as engine:
        lines = {engine.add(prompt, params): number for number, prompt in enumerate(prompts)}
        while engine.busy:
            for progress in engine.step():
                tokens += progress.token is not None
                if progress.completion is None:
                    continue
                done += 1
                result = {"line": lines[progress.request], "text": progress.completion.text}
                sys.stdout.write(json.dumps(result) + "\n")
            rate = tokens / (time.monotonic() - began)
            sys.stderr.write(f"\r{done}/{len(prompts)} lines, {rate:.0f} tokens/s ")
    sys.stderr.write("\n")


if __name__ == "__main__":
    main()
