"""Fields that a newer CRD lets through and this operator does not know. Pure.

A CRD is upgraded before its operator, and the API server then fills in the defaults of new fields in every object. An
operator that refused them would stop looking after all services for that while; so they are left out, and named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel

from baton_operator.resources import LLMServiceSpec, parts_of


def without_newer_fields(spec: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The spec as far as it is known here, and the paths of the rest."""
    unknown: list[str] = []
    return _known(LLMServiceSpec, spec, "spec", unknown), tuple(sorted(unknown))


def _known(part: type[BaseModel], given: Mapping[str, Any], path: str, unknown: list[str]) -> dict[str, Any]:
    fields = {field.alias or name: field for name, field in part.model_fields.items()}
    unknown += [f"{path}.{key}" for key in given if key not in fields]
    return {
        key: _known_value(next(parts_of(fields[key].annotation), None), value, f"{path}.{key}", unknown)
        for key, value in given.items()
        if key in fields
    }


def _known_value(part: type[BaseModel] | None, value: Any, path: str, unknown: list[str]) -> Any:
    """What is not of the shape that the part has is kept: it is refused by name where it is parsed."""
    if part is not None and isinstance(value, Mapping):
        return _known(part, cast("Mapping[str, Any]", value), path, unknown)
    if part is not None and isinstance(value, list):
        items = enumerate(cast("list[Any]", value))
        return [_known_value(part, item, f"{path}[{index}]", unknown) for index, item in items]
    return value
