"""Request bodies in vLLM's dialect of OpenAI's API: what is accepted, refused by name, ignored aloud."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from gateway.errors import InvalidRequest
from gateway.generation import TextRules
from gateway.length import AskedLength
from gateway.token_log import StopRules
from kvtransfer.protocol import baton_pb2 as pb
from modelfiles import GenerationDefaults

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_MESSAGES = 1024
MAX_LOGPROBS = 20
MAX_PROMPTS = 128
COMPLETION_MAX_TOKENS = 16
GREEDY_BELOW = 1e-5  # vLLM's threshold

# Known fields that this gateway does not support yet, with the values that ask for nothing. Anything else is a 400:
# an answer that silently ignores a constraint is worse than none.
UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    "allowed_token_ids": (None,),
    "audio": (None,),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "chat_template": (None,),
    "documents": (None, []),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "include_reasoning": (None, True),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1.0),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True),
    "prediction": (None,),
    "priority": (None, 0),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "return_tokens_as_token_ids": (None, False),
    "service_tier": (None, "auto", "default"),
    "spaces_between_special_tokens": (None, True),
    "store": (None, False),
    "stream_interval": (None, 1),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "thinking_token_budget": (None,),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "use_beam_search": (None, False),
    "verbosity": (None,),
    "web_search_options": (None,),
}

TokenId = Annotated[int, Field(ge=0, lt=2**32)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Body(BaseModel):
    """Unknown fields are kept in `model_extra`; an explicit null is the same as leaving the field out."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data  # pyright: ignore[reportUnknownVariableType]


class StreamOptions(_Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(_Body):
    """Fields that both dialects share. Defaults None mean: the model's own, then vLLM's."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: Finite | None = Field(None, ge=0)
    top_p: Finite | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: Finite = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    frequency_penalty: Finite = Field(0.0, ge=-2, le=2)
    presence_penalty: Finite = Field(0.0, ge=-2, le=2)
    repetition_penalty: Finite | None = Field(None, gt=0, le=2)
    min_tokens: int = Field(0, ge=0)
    stop: StopString | list[StopString] | None = None
    stop_token_ids: list[TokenId] = Field(default_factory=list[int], max_length=128)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    request_id: Annotated[str, StringConstraints(max_length=128)] | None = None
    return_token_ids: bool = False
    metrics: bool = False
    user: str | None = None
    metadata: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _limits(self) -> SamplingBody:
        if len(self.stops) > MAX_STOPS:
            raise ValueError(f"stop: {len(self.stops)} strings exceed the limit of {MAX_STOPS}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        return self


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """What every template relies on: a role, and content that is text. Raises: ValueError naming message and field."""
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise ValueError(f"messages.{number}.role: a string is required (got {_shown(message.get('role'))})")
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            raise ValueError(
                f"messages.{number}.content: a string or a list of text parts is required (got {_shown(content)})"
            )


class ChatBody(SamplingBody):
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict[str, Any])
    echo: Literal[False] = False
    prompt_name: ClassVar[str] = "messages"

    @model_validator(mode="after")
    def _chat(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs: {self.top_logprobs} needs logprobs to be true")
        if self.add_generation_prompt and self.continue_final_message:
            if "add_generation_prompt" in self.model_fields_set:
                raise ValueError("continue_final_message: cannot be true together with add_generation_prompt")
            self.add_generation_prompt = False
        check_messages(self.messages)
        return self

    @property
    def num_logprobs(self) -> int:
        return self.top_logprobs if self.logprobs else -1

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wanted_name(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class CompletionBody(SamplingBody):
    prompt: str | list[TokenId] | list[list[TokenId]] | list[str] = Field(...)
    max_tokens: int = Field(COMPLETION_MAX_TOKENS, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = True
    prompt_name: ClassVar[str] = "prompt"

    @model_validator(mode="after")
    def _completion(self) -> CompletionBody:
        if not self.prompt:
            raise ValueError("prompt: must not be empty")
        if len(self.prompts) > MAX_PROMPTS:
            raise ValueError(f"prompt: {len(self.prompts)} prompts exceed the limit of {MAX_PROMPTS}")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: not supported together with logprobs (logprobs of the prompt are not computed)")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]  # type: ignore[list-item]  # narrowed by its first item
        return list(prompt)  # type: ignore[arg-type]  # a list of prompts

    @property
    def num_logprobs(self) -> int:
        return -1 if self.logprobs is None else self.logprobs

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def wanted_name(self) -> str:
        return "max_tokens"


class TokenizeBody(_Body):
    """One of prompt and messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict[str, Any])

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: send either prompt or messages")
        check_messages(self.messages or ())
        return self


class DetokenizeBody(_Body):
    model: str | None = None
    tokens: list[TokenId]


class ProbeBody(_Body):
    """POST /internal/probe."""

    revision: str = Field(max_length=63)


B = TypeVar("B", bound=_Body)

# pydantic's words that name no limit, or a class of ours
_SAID_BETTER: Final[Mapping[str, str]] = {
    "int_parsing_size": "Input should be an integer of at most 64 bits",
    "model_type": "Input should be an object",
    "dict_type": "Input should be an object",
}


def parse(kind: type[B], data: Any) -> tuple[B, list[str]]:
    """The validated body, and the names of unknown fields (accepted, and told to the client).

    Raises: InvalidRequest naming field, value and limit.
    """
    if not isinstance(data, dict):
        raise InvalidRequest(f"body: expected a JSON object, got {type(data).__name__}")
    try:
        body = kind.model_validate(data)
    except ValidationError as error:
        raise _explain(error) from error
    extra = body.model_extra or {}
    for name, value in extra.items():
        harmless = UNSUPPORTED.get(name)
        if harmless is not None and value not in harmless:
            raise InvalidRequest(
                f"{name}: not supported by this server yet (got {_shown(value)}); leave it out", param=name
            )
    parts = {name: getattr(body, name) for name in body.model_fields_set}
    inside = [
        f"{name}.{each}" for name, part in parts.items() if isinstance(part, _Body) for each in part.model_extra or ()
    ]
    return body, sorted([*(name for name in extra if name not in UNSUPPORTED), *inside])


def _explain(error: ValidationError) -> InvalidRequest:
    """The first problem in one sentence."""
    problems = error.errors(include_url=False)
    top = problems[0]["loc"][:1]
    # of a union's branches, the one that went deepest is the one the client meant
    problem = max((p for p in problems if p["loc"][:1] == top), key=lambda p: len(p["loc"]))
    if problem["type"] == "value_error":  # ours: names the field itself
        message = str(problem["ctx"]["error"]) if "ctx" in problem else problem["msg"]
        return InvalidRequest(message, param=message.split(":")[0].split(".")[0])
    place = ".".join(str(part) for part in problem["loc"] if not _is_branch(part))
    shown = "" if problem["type"] == "missing" else f" (got {_shown(problem['input'])})"
    said = _SAID_BETTER.get(problem["type"], problem["msg"])
    return InvalidRequest(f"{place}: {said}{shown}", param=str(problem["loc"][0]) if problem["loc"] else None)


def _shown(value: object) -> str:
    """The client's value, cut: an error is no place for a whole prompt."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_branch(part: int | str) -> bool:
    """Pydantic names the branch of a union in the error's place ("constrained-str", "list[str]")."""
    return isinstance(part, str) and (part in ("str", "int") or not part.isidentifier())


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the model itself says: its limits, its end tokens, its own sampling defaults."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)


def asked_length(body: ChatBody | CompletionBody, num_prompt_tokens: int) -> AskedLength:
    return AskedLength(num_prompt_tokens, body.wanted_tokens, body.prompt_name, body.wanted_name)


def sampling_of(
    body: ChatBody | CompletionBody, length: AskedLength, limits: ModelLimits
) -> tuple[pb.SamplingParams, StopRules, TextRules]:
    """How tokens are drawn, what ends them, and how they become text. Raises: InvalidRequest."""
    max_tokens = _max_tokens(body, length, limits)
    if body.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens: {body.min_tokens} exceeds {body.wanted_name} {max_tokens}; lower it", param="min_tokens"
        )
    defaults = limits.defaults
    temperature = _first(body.temperature, defaults.temperature, 1.0)
    top_k = max(0, int(_first(body.top_k, defaults.top_k, 0)))
    sampling = pb.SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=0 if top_k >= limits.vocab_size else top_k,
        top_p=_first(body.top_p, defaults.top_p, 1.0),
        seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=body.ignore_eos,
        num_logprobs=body.num_logprobs,
        repetition_penalty=_first(body.repetition_penalty, defaults.repetition_penalty, 1.0),
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        min_p=body.min_p,
    )
    stop_rules = StopRules(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        stop_token_ids=frozenset(body.stop_token_ids),
        eos_token_ids=frozenset() if body.ignore_eos else limits.eos_token_ids,
    )
    return sampling, stop_rules, TextRules(body.stops, body.include_stop_str_in_output, body.skip_special_tokens)


def checked_prompt(body: ChatBody | CompletionBody, token_ids: list[int], limits: ModelLimits) -> tuple[int, ...]:
    """The prompt's ids, cut where the client asked for it. Raises: InvalidRequest."""
    if body.truncate_prompt_tokens is not None:
        token_ids = token_ids[-body.truncate_prompt_tokens :]
    name = body.prompt_name
    if not token_ids:
        raise InvalidRequest(f"{name}: no tokens; send at least one", param=name)
    check_in_vocabulary(name, token_ids, limits)
    return tuple(token_ids)


def check_in_vocabulary(name: str, token_ids: Sequence[int], limits: ModelLimits) -> None:
    """Raises: InvalidRequest naming the field and an id that the model does not have."""
    largest = max(token_ids, default=0)
    if largest >= limits.vocab_size:
        raise InvalidRequest(
            f"{name}: token id {largest} is not below the vocabulary size {limits.vocab_size}", param=name
        )


def _max_tokens(body: ChatBody | CompletionBody, length: AskedLength, limits: ModelLimits) -> int:
    length.check(limits.max_model_len, "the model's")
    room = limits.max_model_len - length.num_prompt_tokens
    return body.wanted_tokens or min(room, limits.defaults.max_new_tokens or room)


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
