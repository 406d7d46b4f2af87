"""An encoder-decoder answers completions; what its encoder reads is the prompt."""

from __future__ import annotations

import openai
import pytest
import tiny_model
import torch
from drivetrain_server import Server
from served import client_of, settings
from transformers import T5ForConditionalGeneration


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_completions_are_those_of_transformers(tmp_path, dtype):
    folder = tiny_model.write_crossed(tmp_path)
    prompts, kind = ["hello there", "once upon a time"], getattr(torch, dtype)
    words = tiny_model.tokenizer()
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=kind).eval()
    with Server(settings(folder, dtype=dtype, threads=1)) as server, client_of(server) as client:
        asked = {"model": "tiny", "prompt": prompts, "max_tokens": 10, "temperature": 0}
        found = client.completions.create(**asked, logprobs=0)
        with pytest.raises(openai.BadRequestError, match="chat template"):
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "hello"}]
            )
    assert found.usage.prompt_tokens == sum(map(len, prompts))
    for prompt, choice in zip(prompts, found.choices, strict=True):
        source = torch.tensor([words(prompt)["input_ids"]])
        made = model.generate(source, max_new_tokens=10, do_sample=False)
        if dtype == "float32":
            assert choice.text
            assert choice.text == words.decode(made[0, 1:], skip_special_tokens=True)
        with torch.no_grad():
            told = model(input_ids=source, decoder_input_ids=made[:, :1]).logits[0, 0].float()
        best = float(told.log_softmax(0).max())
        assert choice.logprobs.token_logprobs[0] == pytest.approx(
            best, abs=1e-4 if dtype == "float32" else 0.05
        )
