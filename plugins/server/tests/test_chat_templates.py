"""Chat templates render as Transformers renders them, and cannot do anything else."""

from __future__ import annotations

import asyncio

import pytest
import tiny_model
from drivetrain_server.templates.renderer import Renderer
from drivetrain_server.templates.sandbox import BadTemplateError, ChatTemplate

TALK = [
    {"role": "system", "content": "Be <b>brief</b> & kind"},
    {"role": "user", "content": "Grüße\n{{ 1 + 1 }}"},
    {"role": "assistant", "content": "ok"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "ä <x>"}}]
MANY = (
    "{{ bos_token or '' }}{%- for m in messages -%}\n"
    "{% if loop.index > 2 %}{% break %}{% endif %}\n"
    "  {% if m['role'] == 'assistant' %}{% generation %}{{ m.content | trim }}{% endgeneration %}\n"
    "  {% else %}[{{ m.role | upper }}]{{ m.content }}{% endif %}{% endfor %}\n"
    "{%- if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@pytest.mark.parametrize("template", [tiny_model.TEMPLATE, MANY])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_template_renders_as_in_transformers(template, tools):
    words = tiny_model.tokenizer()
    words.chat_template = template
    words.bos_token = "<|start|>"
    expected = words.apply_chat_template(
        TALK, tools=tools, tokenize=False, add_generation_prompt=True
    )
    ours = ChatTemplate(template, words.special_tokens_map)
    assert ours.render(TALK, tools, {}) == expected


def test_the_template_for_tools_is_taken_where_there_are_tools():
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert template.render(TALK, None, {}) == "plain"
    assert template.render(TALK, TOOLS, {}) == "tools"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{{ 'x' * 10**9 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ raise_exception('no') }}",
        "{{ nothing.at.all }}",
        "{% for i in range(10**7) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template):
    with pytest.raises(BadTemplateError, match="fails on these messages"):
        ChatTemplate(template, {}).render(TALK, None, {})


def test_a_template_that_is_none_says_where():
    with pytest.raises(BadTemplateError, match="cannot be read"):
        ChatTemplate("{% for %}", {})


def test_a_template_that_takes_too_long_or_too_much_ends_and_the_next_one_renders():
    source = (
        "{% if messages[0] == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% elif messages[0] == 'big' %}{% for a in range(99999) %}"
        "{{ 'x' * 1000 }}{% endfor %}{% else %}{{ messages[0] }}{% endif %}"
    )

    async def main():
        renderer = Renderer(source, {}, 0.5)
        try:
            with pytest.raises(BadTemplateError, match=r"in 0\.5 s"):
                await renderer.render(["loop"], None, {})
            with pytest.raises(BadTemplateError, match="more than 8388608 characters"):
                await renderer.render(["big"], None, {})
            many = [renderer.render([str(n)], None, {}) for n in range(20)]
            assert await asyncio.gather(*many) == [str(n) for n in range(20)]
            left = asyncio.create_task(renderer.render(["loop"], None, {}))
            await asyncio.sleep(0.1)
            left.cancel()
            assert await renderer.render(["after"], None, {}) == "after"
        finally:
            await renderer.close()

    asyncio.run(main())
