"""Chat messages to a prompt, exactly as transformers' apply_chat_template does, without transformers.

Templates come from model repositories: they run in jinja2's immutable sandbox, see plain JSON values only, and their
output is bounded while it is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from gateway.errors import InvalidRequest

CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_TEXT_PARTS = {"text": "text", "input_text": "text", "refusal": "refusal"}  # type of a part: where its text is
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """One compiled template with the model's special tokens."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], max_chars: int = 8 << 20) -> None:
        self._source = source
        self._template = _environment().from_string(source)
        self._special_tokens = dict(special_tokens)
        self._max_chars = max_chars

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt text. `variables` are what else the template may read (chat_template_kwargs).

        Raises: InvalidRequest with the template's own words where it refuses the messages.
        """
        chat = [_with_reasoning_aliases(dict(message)) for message in messages]
        final = _tag_final_message(chat) if continue_final_message else None
        context = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **(variables or {}),
            "messages": chat,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._bounded_render(context)
        except TemplateError as error:
            raise InvalidRequest(
                f"messages: the model's chat template refused them: {error}", param="messages"
            ) from error
        except (TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            raise InvalidRequest(
                f"messages: the model's chat template cannot render them: {type(error).__name__}: {error}",
                param="messages",
            ) from error
        return text if final is None else _cut_at_tag(text, final)

    def _bounded_render(self, context: dict[str, Any]) -> str:
        parts: list[str] = []
        num_chars = 0
        for part in self._template.generate(context):
            parts.append(part)
            num_chars += len(part)
            if num_chars > self._max_chars:
                raise InvalidRequest(f"messages: the rendered prompt is longer than {self._max_chars} characters")
        return "".join(parts)


def flatten_content(content: Any) -> Any:
    """Content as one string, as vLLM does for templates that expect one: parts joined, nothing as the empty text."""
    if content is None:
        return ""
    return "\n".join(map(_text_of_part, cast("list[Any]", content))) if isinstance(content, list) else content


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    fields = cast("dict[str, Any]", part) if isinstance(part, dict) else {}
    kind = fields.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise InvalidRequest(
            f"messages: content part of type {kind!r} is not supported by this model; send text parts only",
            param="messages",
        )
    text = fields.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise InvalidRequest(
            f"messages: content part of type {kind!r} needs the string {_TEXT_PARTS[kind]!r}", param="messages"
        )
    return text


def _with_reasoning_aliases(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning goes by three names; templates read any one of them."""
    value = next((message[name] for name in REASONING_FIELDS if message.get(name) is not None), None)
    if value is not None:
        for name in REASONING_FIELDS:
            message.setdefault(name, value)
    return message


def _tag_final_message(chat: list[dict[str, Any]]) -> str:
    if not chat or not isinstance(chat[-1].get("content"), str):
        raise InvalidRequest("continue_final_message: the final message has no text to continue", param="messages")
    final: str = chat[-1]["content"]
    chat[-1]["content"] = final + CONTINUE_TAG
    return final


def _cut_at_tag(text: str, final: str) -> str:
    tag = CONTINUE_TAG.strip()
    if final.strip() not in text or tag not in text:
        raise InvalidRequest(
            "continue_final_message: the chat template drops or changes the final message",
            param="continue_final_message",
        )
    at = text.rindex(tag)
    is_spacing_kept = text[at : at + len(CONTINUE_TAG)] == CONTINUE_TAG
    return text[:at] if is_spacing_kept else text[:at].rstrip()


# ---------------------------------------------------------------- the sandbox


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's tokens for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own class attribute

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_render"), [], [], body)
        block.set_lineno(line)
        return block

    def _render(self, caller: Macro) -> str:
        return caller()


class _TemplateDict:
    """`dict` without the class: nothing to climb from."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """A namespace that takes no underscore names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportSelfClsParameterName]  # jinja2's trick: `namespace(self=...)` works
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot set the attribute {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _TemplateDict()
    environment.globals["namespace"] = _TemplateNamespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Not jinja2's own filter: that one escapes HTML characters, and prompts are not HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
