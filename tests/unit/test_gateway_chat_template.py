"""Chat templates render as transformers renders them, inside a sandbox."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from gateway.chat_template import ChatTemplate, flatten_content
from gateway.errors import InvalidRequest

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief — naïve <b>&amp;</b> 北京."},
    {"role": "user", "content": "Hi \n"},
    {"role": "assistant", "content": "Hello", "tool_calls": [{"name": "f", "arguments": {"ä": [1, 2.5, None, True]}}]},
    {"role": "user", "content": "And?"},
]
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "blocks": (
        "{{ bos_token }}\n{%- for m in messages %}\n    {%- if m.role == 'system' %}\n[SYS]{{ m.content | trim }}\n"
        "    {% elif m.role == 'user' %}\n[U]{{ m.content }}\n    {%- else %}\n"
        "{% generation %}[A]{{ m.content }}{{ eos_token }}{% endgeneration %}\n    {% endif %}\n{%- endfor %}\n"
    ),
    "json": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "loopcontrols": "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{{ dict(a=1) }}{{ documents is none }}{{ tools is none }}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_template_renders_as_in_transformers(name: str, add_generation_prompt: bool) -> None:
    source = TEMPLATES[name]
    theirs, _ = render_jinja_template(
        [MESSAGES], chat_template=source, add_generation_prompt=add_generation_prompt, **SPECIAL
    )
    ours = ChatTemplate(source, SPECIAL).render(MESSAGES, add_generation_prompt=add_generation_prompt)
    assert ours == theirs[0]


@pytest.mark.parametrize("content", ["Hello", "Hello  ", "Hello\n"])
@pytest.mark.parametrize("name", ["chatml", "blocks"])
def test_continuing_the_final_message_cuts_as_transformers_does(name: str, content: str) -> None:
    source = TEMPLATES[name]
    messages = [MESSAGES[1], {"role": "assistant", "content": content}]
    theirs, _ = render_jinja_template([messages], chat_template=source, continue_final_message=True, **SPECIAL)
    ours = ChatTemplate(source, SPECIAL).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert ours == theirs[0]
    assert messages[-1]["content"] == content


def test_variables_of_the_client_reach_the_template() -> None:
    template = ChatTemplate("{{ enable_thinking }}{{ bos_token }}", SPECIAL)
    assert template.render([], {"enable_thinking": False}) == "False<s>"


def test_a_template_that_refuses_gives_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    try:
        text = ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    except InvalidRequest:
        return
    assert "module" not in text
    assert "class" not in text


def test_a_template_cannot_fill_the_memory() -> None:
    template = ChatTemplate("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", {}, max_chars=100_000)
    with pytest.raises(InvalidRequest, match="longer than 100000"):
        template.render([])


def test_text_parts_are_joined_and_other_parts_named() -> None:
    assert flatten_content([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "a\nb"
    assert flatten_content("plain") == "plain"
    with pytest.raises(InvalidRequest, match="'image_url' is not supported"):
        flatten_content([{"type": "image_url", "image_url": {"url": "x"}}])
