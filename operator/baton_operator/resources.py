"""The `LLMService` resource: what a user asks for, validated. One model for local mode, CRD and Helm values.

A field enters with the code that reads it. Keys are camelCase, as Kubernetes has them; unknown keys are refused.
Nothing here does I/O: callers hand in the parsed mapping.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

API_VERSION = "serving.baton.dev/v1alpha1"
KIND = "LLMService"

_QUANTITY = re.compile(r"^(\d+(?:\.\d+)?)\s*(Ki|Mi|Gi|Ti|k|M|G|T)?$")
_QUANTITY_FACTORS = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_DURATION_FACTORS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class ResourceError(ValueError):
    """A resource that cannot be used. One line per mistake: field path, value, limit, what to do."""


def parse_quantity(value: object) -> object:
    """Read a Kubernetes quantity (`2Gi`, `500M`, `1048576`) as bytes."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("is not an amount of memory; write for example 512Mi or 2Gi")
    match = _QUANTITY.match(str(value).strip())
    if not match:
        raise ValueError("is not an amount of memory; write for example 512Mi or 2Gi")
    return int(float(match[1]) * _QUANTITY_FACTORS[match[2] or ""])


def parse_duration(value: object) -> object:
    """Read a duration (`500ms`, `2s`, `1m30s`) as seconds. A bare number is refused: its unit would be a guess."""
    text = str(value).strip()
    parts = _DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("is not a duration; write for example 500ms, 2s or 1m30s")
    return sum(float(number) * _DURATION_FACTORS[unit] for number, unit in parts)


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("is not a power of two; use 8, 16 or 32 if unsure")
    return value


Quantity = Annotated[int, BeforeValidator(parse_quantity), Field(gt=0)]
Duration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]


class Disaggregation(StrEnum):
    """Whether a prompt may be, must be or never is run by a prefill worker."""

    AUTO = "Auto"
    ALWAYS = "Always"
    NEVER = "Never"


class _Part(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)


class Metadata(_Part):
    name: str = Field(
        default="baton", max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", description="the service's name"
    )


class Model(_Part):
    source: str = Field(
        default="smollm2", min_length=1, description="smollm2, a Hugging Face id, a folder or a .gguf file"
    )
    name: str | None = Field(
        default=None, min_length=1, description="the name that clients send; default: the source's"
    )


class Pool(_Part):
    replicas: int = Field(default=1, ge=0, le=64, description="how many workers; decode needs at least 1")
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of each worker; default: an equal share"
    )
    kv_memory: Quantity | None = Field(default=None, description="KV memory of each worker; default: an equal share")


class Pools(_Part):
    prefill: Pool = Pool()
    decode: Pool = Pool()


class Objectives(_Part):
    ttft: Duration | None = Field(default=None, description="time to first token to aim for; orders the prefill queue")


class Gateway(_Part):
    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0: every one")
    port: int = Field(default=8000, ge=1, le=65535, description="port of the API")
    api_keys_file: str | None = Field(
        default=None, description="file with one accepted API key a line; default: no key needed"
    )
    max_queue_requests: int | None = Field(
        default=None, ge=1, description="requests that may wait for their first token; more get a 503; default: 512"
    )
    max_queue_tokens: int | None = Field(
        default=None, ge=1, description="prompt tokens that may wait for their first token; default: 1,000,000"
    )


class Engine(_Part):
    block_size: Annotated[int, Field(ge=1, le=256), AfterValidator(_power_of_two)] | None = Field(
        default=None, description="tokens per KV block, a power of two; default: 16"
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="longest prompt and output together; default: the model's own"
    )
    max_num_seqs: int | None = Field(default=None, ge=1, le=65536, description="sequences in one batch; default: 64")
    max_batched_tokens: int | None = Field(
        default=None, ge=1, description="tokens in one step of a worker; default: the worker's own"
    )
    prefix_caching: bool = Field(default=True, description="keep finished blocks for prompts that begin alike")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="type of weights and KV in memory")


class LLMServiceSpec(_Part):
    model: Model = Model()
    pools: Pools = Pools()
    disaggregation: Disaggregation = Field(
        default=Disaggregation.AUTO,
        description="Auto: decided per request; Always: by a prefill worker; Never: by the decode worker",
    )
    deterministic: bool = Field(
        default=False, description="same seed, same bytes, whatever else runs and whatever fails"
    )
    objectives: Objectives = Objectives()
    gateway: Gateway = Gateway()
    engine: Engine = Engine()

    @model_validator(mode="after")
    def _check_pools(self) -> Self:
        if self.pools.decode.replicas < 1:
            raise ValueError("pools.decode.replicas is 0, but a decode worker owns every request; give at least 1")
        if self.disaggregation is Disaggregation.ALWAYS and self.pools.prefill.replicas < 1:
            raise ValueError(
                "disaggregation is Always, but pools.prefill.replicas is 0; give at least 1 or choose Auto or Never"
            )
        return self


class LLMService(_Part):
    api_version: Literal["serving.baton.dev/v1alpha1"] = Field(default=API_VERSION, description="must be stated")
    kind: Literal["LLMService"] = Field(default=KIND, description="must be stated")
    metadata: Metadata = Metadata()
    spec: LLMServiceSpec = LLMServiceSpec()


def parse_llm_service(document: object, *, where: str) -> LLMService:
    """Validate a parsed YAML document; `where` (a file's name) opens every line of an error.

    Raises: ResourceError.
    """
    if not isinstance(document, Mapping):
        raise ResourceError(f"{where}: expected an LLMService (a mapping), found {type(document).__name__}")
    given = cast("Mapping[str, Any]", document)
    missing = [key for key in ("apiVersion", "kind") if key not in given]
    if missing:
        raise ResourceError(
            f"{where}: {' and '.join(missing)} missing; begin with `apiVersion: {API_VERSION}` and `kind: {KIND}`"
        )
    try:
        return LLMService.model_validate(given)
    except ValidationError as error:
        lines = [_explain(dict(mistake)) for mistake in error.errors()]
        raise ResourceError("\n".join(f"{where}: {line}" for line in lines)) from error


def _explain(mistake: dict[str, Any]) -> str:
    """One of pydantic's mistakes as: field path = value, what is wrong, what to do."""
    location = [str(part) for part in mistake["loc"]]
    path = ".".join(location) or "the document"
    value, kind, context = mistake["input"], str(mistake["type"]), cast("dict[str, Any]", mistake.get("ctx", {}))
    if kind == "extra_forbidden":
        return _explain_unknown(location)
    if kind == "value_error":
        reason = str(context.get("error", mistake["msg"]))
        return f"{path}: {reason}" if isinstance(value, BaseModel | dict) else f"{path} = {value!r} {reason}"
    if kind == "greater_than_equal":
        return f"{path} = {value!r} is too small; give at least {context['ge']}"
    if kind == "greater_than":
        return f"{path} = {value!r} is too small; give more than {context['gt']}"
    if kind == "less_than_equal":
        return f"{path} = {value!r} is too large; give at most {context['le']}"
    if kind in ("literal_error", "enum"):
        return f"{path} = {value!r} is not known; use {context['expected']}"
    if kind == "string_pattern_mismatch":
        return f"{path} = {value!r} is not a name; use lower-case letters, digits and '-' (inside only)"
    if kind == "string_too_long":
        return f"{path} = {value!r} is too long; use at most {context['max_length']} characters"
    return f"{path} = {value!r}: {str(mistake['msg']).lower()}"


def _explain_unknown(location: list[str]) -> str:
    known = _known_keys(location[:-1])
    close = difflib.get_close_matches(location[-1], known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    parent = ".".join(location[:-1]) or "the document"
    return f"{'.'.join(location)}: unknown key; {hint}known keys of {parent}: {', '.join(known)}"


def _known_keys(location: list[str]) -> list[str]:
    part: type[BaseModel] = LLMService
    for key in location:
        field = next(field for name, field in part.model_fields.items() if (field.alias or name) == key)
        annotation: Any = field.annotation
        part = cast("type[BaseModel]", annotation)
    return sorted(field.alias or name for name, field in part.model_fields.items())
