"""Greedy tokens of the engine beside those of Transformers, on prompts of real text.

    python benchmarks/greedy_agreement.py --model FOLDER_OR_GGUF_FILE

The prompts are 64 paragraphs of this repository's documentation: half to be continued, half as
questions in the model's chat template. Each is continued by ``transformers.generate`` alone, and by
the engine with all of them at once, in float32. Tokens count up to the first place where the
reference's best two logits differ by less than 1e-4, which is as far as two right ways need agree.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from drivetrain_inference import SamplingParams, load_model, serve
from drivetrain_inference.loading import load_tokenizer

CLEAR = 1e-4


def paragraphs(number: int) -> list[str]:
    """Texts of 200 to 900 characters from the pages below ``docs``."""
    pages = sorted((Path(__file__).parents[1] / "docs").rglob("*.md"))
    found = [
        " ".join(part.split())
        for page in pages
        if "reference" not in page.parts
        for part in page.read_text("utf-8").split("\n\n")
        if 200 <= len(part) <= 900 and part[0].isalpha()
    ]
    return found[:: max(1, len(found) // number)][:number]


def prompts_of(tokenizer: Any, number: int) -> list[list[int]]:
    """Tokens of each prompt."""
    found = []
    for place, text in enumerate(paragraphs(number)):
        if place % 2:
            asked = [{"role": "user", "content": f"Explain in two sentences: {text}"}]
            text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        found.append(tokenizer(text)["input_ids"])
    return found


def expected(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """Transformers' tokens, and the logits [tokens, vocabulary] that they were chosen from."""
    found = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return found.sequences[0, len(prompt) :].tolist(), torch.cat(found.logits).float()


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, torch.float32), load_tokenizer(options.model)
    prompts = prompts_of(tokenizer, options.prompts)
    params = SamplingParams(max_new_tokens=options.tokens, logprobs=0)
    with serve(model, {"inference": {"max_context": 1024}}) as engine:
        fast, results = engine.fast, engine.generate(prompts, params)
    same = compared = unclear = 0
    worst = 0.0
    for prompt, (result,) in zip(prompts, results, strict=True):
        wanted, logits = expected(model, prompt, options.tokens)
        best = logits.topk(2, dim=1).values
        clear = (best[:, 0] - best[:, 1] > CLEAR).tolist()
        until = clear.index(False) if False in clear else len(wanted)
        unclear += until < len(wanted)
        compared += until
        logprobs = torch.log_softmax(logits, 1)
        for place in range(min(until, len(result.tokens))):
            if result.tokens[place] != wanted[place]:
                break
            same += 1
            off = result.logprobs[place].chosen - float(logprobs[place, wanted[place]])
            worst = max(worst, abs(off))
    report = {
        "prompts": len(prompts), "prompt_tokens": sum(map(len, prompts)), "fast": fast,
        "compared": compared, "same": same, "ended_at_an_unclear_choice": unclear,
        "largest_difference_of_logprobs": worst,
    }  # fmt: skip
    print(json.dumps({"greedy": report}, indent=1))


if __name__ == "__main__":
    main()
