"""The real client of OpenAI gets what the model says, in every form that it can ask for."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
import tiny_model
import torch
from served import HELLO, client_of
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def reference(folder):
    """Greedy continuations of a prompt by Transformers, and their log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)

    def run(prompt, tokens):
        ids = words(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found = model.generate(
                ids, max_new_tokens=tokens, do_sample=False, output_logits=True,
                return_dict_in_generate=True, attention_mask=torch.ones_like(ids), pad_token_id=0,
            )  # fmt: skip
        new = found.sequences[0, ids.shape[1] :]
        logprobs = torch.log_softmax(torch.cat(found.logits).float(), dim=1)
        # A character that is cut off at the end is not shown.
        text = words.decode(new, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
        return text, new.tolist(), logprobs, ids.shape[1]

    return run


def prompt_of(messages, tools=None):
    return tiny_model.tokenizer().apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True
    )


def test_a_chat_says_what_transformers_generates(client, reference):
    text, tokens, logprobs, prompt = reference(prompt_of(HELLO), 24)
    found = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=24, temperature=0, logprobs=True, top_logprobs=3
    )
    (choice,) = found.choices
    assert choice.message.content == text
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (prompt, len(tokens))
    for place, token in enumerate(choice.logprobs.content):
        assert token.logprob == pytest.approx(float(logprobs[place, tokens[place]]), abs=1e-4)
        best = logprobs[place].topk(3).values.tolist()
        assert [each.logprob for each in token.top_logprobs] == pytest.approx(best, abs=1e-4)


def test_a_completion_continues_texts_and_tokens(client, reference):
    text, _, _, prompt = reference("Once upon", 12)
    ids = tiny_model.tokenizer()("Once upon")["input_ids"]
    found = client.completions.create(
        model="tiny", prompt=["Once upon", "Once upon"], max_tokens=12, temperature=0, echo=True
    )
    assert [choice.text for choice in found.choices] == ["Once upon" + text] * 2
    assert found.usage.prompt_tokens == 2 * prompt
    found = client.completions.create(model="tiny", prompt=ids, max_tokens=12, temperature=0)
    assert found.choices[0].text == text


def test_a_stream_adds_up_to_the_whole_with_usage_at_the_end(client):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 30, "seed": 3, "n": 3}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    texts, ends = ["", "", ""], [None] * 3
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) == 3
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_seed_repeats_a_result_and_no_seed_does_not(client):
    def draw(**options):
        found = client.completions.create(
            model="tiny", prompt="a", max_tokens=30, temperature=1.5, **options
        )
        return found.choices[0].text

    assert draw(seed=-5) == draw(seed=-5)
    assert draw() != draw()


def test_stop_texts_end_a_result_and_a_penalty_changes_it(client):
    def text(**options):
        found = client.completions.create(
            model="tiny", prompt="abc", max_tokens=40, temperature=0, **options
        )
        return found.choices[0]

    plain = text().text
    stop = plain[5:7]
    stopped = text(stop=[stop])
    assert stopped.text == plain[: plain.index(stop)]
    assert stopped.finish_reason == "stop"
    first = tiny_model.tokenizer()(plain[0])["input_ids"][0]
    assert text(logit_bias={str(first): -100}).text[0] != plain[0]
    punished = text(frequency_penalty=2.0, presence_penalty=2.0).text
    assert max(map(punished.count, punished)) < max(map(plain.count, plain)) or punished != plain


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_a_result_is_held_to_its_schema(client, temperature):
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["one", "two"]}, "ok": {"type": "boolean"}},
        "required": ["kind", "ok"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    found = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=60, temperature=temperature, n=2,
        response_format={"type": "json_schema", "json_schema": {"name": "k", "schema": schema}},
    )  # fmt: skip
    for choice in found.choices:
        value = json.loads(choice.message.content)
        assert value["kind"] in ("one", "two")
        assert choice.finish_reason == "stop"


def test_a_result_is_held_to_a_regular_expression(client):
    found = client.completions.create(
        model="tiny", prompt="When? ", max_tokens=40,
        extra_body={"response_format": {"type": "regex", "pattern": "[0-9]{4}-[01][0-9]"}},
    )  # fmt: skip
    year, _, month = found.choices[0].text.partition("-")
    assert len(year) == 4
    assert month.isdigit()


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called_is_called_with_arguments_of_its_schema(client, stream):
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools = [
        {"type": "function", "function": {"name": "weather", "parameters": parameters}},
        {"type": "function", "function": {"name": "time"}},
    ]
    choice = {"type": "function", "function": {"name": "weather"}}
    asked = {
        "model": "tiny", "messages": HELLO, "tools": tools, "tool_choice": choice,
        "max_tokens": 200, "temperature": 0,
    }  # fmt: skip
    if stream:
        with client.chat.completions.stream(**asked) as events:
            found = events.get_final_completion().choices[0]
    else:
        found = client.chat.completions.create(**asked).choices[0]
    (call,) = found.message.tool_calls
    assert found.finish_reason == "tool_calls"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")


def test_a_conversation_with_calls_and_parts_reaches_the_template(client):
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    call = {"id": "c1", "type": "function", "function": function}
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}]
    messages = [
        {"role": "developer", "content": parts},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "yes"},
    ]
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    seen = [
        {"role": "system", "content": "Be brief"}, {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": ""}, {"role": "tool", "content": "yes"},
    ]  # fmt: skip
    assert found.usage.prompt_tokens == len(tiny_model.tokenizer()(prompt_of(seen))["input_ids"])


def test_a_shared_beginning_comes_from_the_cache(client):
    long = [{"role": "user", "content": "x" * 200}]
    asked = {"model": "tiny", "messages": long, "max_tokens": 2, "temperature": 0}
    first, second = (client.chat.completions.create(**asked) for _ in range(2))
    assert second.usage.prompt_tokens_details.cached_tokens > 150
    assert first.choices[0].message.content == second.choices[0].message.content


def test_40_streams_at_once_get_what_each_gets_alone(server, client):
    asked = [
        {"model": "tiny", "prompt": f"story {n} ", "max_tokens": 20 + n % 7, "seed": n, "n": 1}
        for n in range(40)
    ]
    alone = [client.completions.create(**each).choices[0].text for each in asked[:6]]

    async def all_at_once():
        async with client_of(server, kind=openai.AsyncOpenAI) as many:

            async def one(each):
                text = ""
                async for chunk in await many.completions.create(**each, stream=True):
                    text += chunk.choices[0].text
                return text, chunk.choices[0].finish_reason

            return await asyncio.gather(*map(one, asked))

    found = asyncio.run(all_at_once())
    assert [text for text, _ in found[:6]] == alone
    assert all(reason in ("stop", "length") for _, reason in found)


def test_the_model_is_listed_and_has_no_embeddings(client):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").max_model_len == tiny_model.CONTEXT
    with pytest.raises(openai.APIStatusError, match="has no embeddings") as caught:
        client.embeddings.create(model="tiny", input="text")
    assert caught.value.status_code == 501
