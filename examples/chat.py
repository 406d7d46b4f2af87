"""Chat with a model in the terminal: python examples/chat.py FOLDER_OR_GGUF_FILE

An empty line ends the talk, Ctrl-C the answer. The cache keeps what was said, so that each answer
computes only what is new.
"""

from __future__ import annotations

import argparse
import sys

import torch
from drivetrain_inference import SamplingParams, serve


def main() -> None:
    """Read a line, stream the answer, and again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder that save_pretrained has written, or a GGUF file")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-new-tokens", type=int, default=300)
    options = parser.parse_args()
    params = SamplingParams(
        temperature=options.temperature, top_p=0.9, max_new_tokens=options.max_new_tokens
    )
    talk: list[dict[str, str]] = []
    with serve(options.model, dtype=torch.bfloat16) as engine:
        while said := input("> ").strip():
            talk.append({"role": "user", "content": said})
            prompt = engine.tokenizer.apply_chat_template(
                talk, tokenize=False, add_generation_prompt=True
            )
            answer = ""
            try:
                for progress in engine.stream(prompt, params):
                    answer += progress.text
                    sys.stdout.write(progress.text)
                    sys.stdout.flush()
            except KeyboardInterrupt:
                sys.stdout.write(" [stopped]")
            sys.stdout.write("\n")
            talk.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
