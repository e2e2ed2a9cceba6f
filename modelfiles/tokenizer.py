"""The tokenizer and the chat templates of a model, without transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from modelfiles.errors import MalformedModel, UnsupportedModel
from modelfiles.gguf_file import GgufFile, read_gguf
from modelfiles.layout import GgufModel, HuggingFaceFolder, find_layout

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_TEMPLATE = "default"
_GGUF_TEMPLATE = "tokenizer.chat_template"
_GGUF_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Spellings of the special tokens, as chat templates use them. None: the model has none."""

    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    pad: str | None = None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The model's tokenizer, neither padding nor truncating.

    `encode(text, add_special_tokens=True)` adds what the model's own configuration adds (a BOS for Llama 3, nothing
    for SmolLM2); a rendered chat template carries its special tokens itself and is encoded without.
    Raises: ModelNotFound, MalformedModel, UnsupportedModel (a GGUF vocabulary we cannot rebuild, by name).
    """
    layout = find_layout(path)
    tokenizer = _from_gguf(layout) if isinstance(layout, GgufModel) else _from_folder(layout)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def load_special_tokens(path: str | Path) -> SpecialTokens:
    """The spellings of BOS, EOS, UNK and PAD."""
    layout = find_layout(path)
    if isinstance(layout, GgufModel):
        return _gguf_special_tokens(read_gguf(layout.path))
    values = {
        **(layout.read_json("special_tokens_map.json") or {}),
        **(layout.read_json("tokenizer_config.json") or {}),
    }
    return SpecialTokens(
        *(_spelling(values.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token"))
    )


def load_chat_template(path: str | Path) -> str | None:
    """The default chat template (Jinja source), or None for a model without one."""
    return load_chat_templates(path).get(DEFAULT_TEMPLATE)


def load_chat_templates(path: str | Path) -> Mapping[str, str]:
    """All chat templates by name ("default", "tool_use", ...). Templates are input: render them in a sandbox only."""
    layout = find_layout(path)
    if isinstance(layout, GgufModel):
        return dict(_gguf_templates(read_gguf(layout.path)))
    return dict(_folder_templates(layout))


def _from_folder(folder: HuggingFaceFolder) -> Tokenizer:
    from tokenizers import Tokenizer

    file = folder.path / "tokenizer.json"
    if not file.is_file():
        raise UnsupportedModel(
            f"{folder.path} has no tokenizer.json; write one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise MalformedModel(f"{file} cannot be read ({error}); fetch the model again") from error


def _from_gguf(model: GgufModel) -> Tokenizer:
    from modelfiles.tokenizer_gguf import build_tokenizer

    return build_tokenizer(read_gguf(model.path))


def _gguf_special_tokens(file: GgufFile) -> SpecialTokens:
    tokens = file.read_strings(_GGUF_TOKENS) or []

    def spell(name: str) -> str | None:
        token_id = file.get_int(f"tokenizer.ggml.{name}_token_id")
        return tokens[token_id] if token_id is not None and 0 <= token_id < len(tokens) else None

    return SpecialTokens(spell("bos"), spell("eos"), spell("unknown"), spell("padding"))


def _gguf_templates(file: GgufFile) -> Iterator[tuple[str, str]]:
    default = file.get_str(_GGUF_TEMPLATE)
    if default is not None:
        yield DEFAULT_TEMPLATE, default
    for name in file.read_strings("tokenizer.chat_templates") or []:
        template = file.get_str(f"{_GGUF_TEMPLATE}.{name}")
        if template is not None:
            yield name, template


def _folder_templates(folder: HuggingFaceFolder) -> Iterator[tuple[str, str]]:
    """Later ones win: transformers prefers the .jinja files to the field in tokenizer_config.json."""
    yield from _configured_templates(folder)
    default = folder.path / "chat_template.jinja"
    if default.is_file():
        yield DEFAULT_TEMPLATE, default.read_text(encoding="utf-8")
    for file in sorted((folder.path / "additional_chat_templates").glob("*.jinja")):
        yield file.stem, file.read_text(encoding="utf-8")


def _configured_templates(folder: HuggingFaceFolder) -> Iterator[tuple[str, str]]:
    configured = (folder.read_json("tokenizer_config.json") or {}).get("chat_template")
    if configured is None:
        return
    if isinstance(configured, str):
        yield DEFAULT_TEMPLATE, configured
        return
    if not isinstance(configured, list):
        raise MalformedModel(f"{folder.path}/tokenizer_config.json: chat_template should be a string or a list")
    for entry in cast(list[object], configured):
        fields = cast(dict[str, object], entry) if isinstance(entry, dict) else {}
        name, template = fields.get("name"), fields.get("template")
        if not isinstance(name, str) or not isinstance(template, str):
            raise MalformedModel(f"{folder.path}/tokenizer_config.json: a chat template needs name and template")
        yield name, template


def _spelling(value: object) -> str | None:
    """A token is written as a string or as an AddedToken object."""
    if isinstance(value, dict):
        value = cast(dict[str, object], value).get("content")
    return value if isinstance(value, str) else None
