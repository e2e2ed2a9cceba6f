"""Values for every field of an LLMService's spec, out of the CRD's schema: what is taken, and what is refused.

A field that is added to resources.py is in the sweep at once; where nothing here fits its schema, `_sweep` says so.
"""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from baton_operator.crd import structural_schema
from baton_operator.resources import API_VERSION, LLMService, Model, ResourceError, parse_llm_service

Spec: TypeAlias = dict[str, Any]
Path: TypeAlias = tuple[str, ...]
ITEM = "[0]"  # in a path: the first item of a list
KEY = "memory"  # of maps: a resource, a label and a variable may all be called so
_TEXTS = ("one", "two", "/models/one", "/models/two", "1Gi", "2Gi", "20m", "30m",
          "example.com/one", "example.com/two")  # fmt: skip
_AFFINITIES = tuple(
    {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
        {"weight": weight, "podAffinityTerm": {"topologyKey": "one", "labelSelector": {"matchLabels": {"a": "b"}}}},
    ]}}
    for weight in (1, 2)
)  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """One field: whole specs that state it, and specs that are refused because of it."""

    path: Path
    valid: tuple[Spec, ...]
    """Two or more that differ in the field alone, or in what it needs beside it."""
    invalid: tuple[Spec, ...]

    @property
    def name(self) -> str:
        """As the API server names it: spec.pools.decode.tolerations[0].key"""
        return ".".join(("spec", *self.path)).replace(f".{ITEM}", ITEM)

    @property
    def is_immutable(self) -> bool:
        """Only model.source and what else its rules compare with what was."""
        said = " ".join(rule.rule for rule in Model.cel_rules)
        return self.path[0] == "model" and f"oldSelf.{self.path[-1]}" in said

    def __str__(self) -> str:
        return self.name


def sweeps() -> tuple[Sweep, ...]:
    schema = structural_schema(LLMService)["properties"]["spec"]
    return tuple(_sweep(schema, path, leaf) for path, leaf in _leaves(schema))


def is_valid(spec: Spec) -> bool:
    try:
        parse(spec)
    except ResourceError:
        return False
    return True


def parse(spec: Spec) -> LLMService:
    metadata = {"name": "chat", "namespace": "ns"}
    document = {"apiVersion": API_VERSION, "kind": "LLMService", "metadata": metadata, "spec": spec}
    return parse_llm_service(document, where="sweep")


def groups(seed: int, size: int) -> list[list[Sweep]]:
    """All fields that may change, in groups that can be stated together, each with as many steps as its longest."""
    left = [sweep for sweep in sweeps() if not sweep.is_immutable]
    random.Random(seed).shuffle(left)
    made: list[list[Sweep]] = []
    while left:
        group: list[Sweep] = []
        for sweep in list(left):
            together = [*group, sweep]
            if len(group) < size and all(is_valid(stated(together, step)) for step in range(num_steps(together))):
                group.append(sweep)
                left.remove(sweep)
        made.append(group)
    return made


def num_steps(group: Sequence[Sweep]) -> int:
    return max(len(sweep.valid) for sweep in group)


def stated(group: Sequence[Sweep], step: int) -> Spec:
    """The spec in which every field of the group has its value of this step."""
    made: Spec = {}
    for sweep in group:
        _merge(made, sweep.valid[step % len(sweep.valid)])
    return made


# ---------------------------------------------------------------- out of the schema


def _leaves(schema: Spec, path: Path = ()) -> Iterator[tuple[Path, Spec]]:
    for name, inner in schema.get("properties", {}).items():
        here = (*path, name)
        if "properties" in inner:
            yield from _leaves(inner, here)
        elif "properties" in inner.get("items", {}):
            yield from _leaves(inner["items"], (*here, ITEM))
        else:
            yield here, inner


def _sweep(schema: Spec, path: Path, leaf: Spec) -> Sweep:
    valid = [spec for value in valid_values(leaf) if (spec := _accepted(schema, path, value)) is not None]
    assert len(valid) > 1, f"{path}: no two values of it are taken: {leaf}"
    most = 3 if "enum" in leaf else 2
    return Sweep(path, tuple(valid[:most]), tuple(_built(schema, path, value) for value in invalid_values(leaf)))


def valid_values(leaf: Spec) -> list[Any]:
    if "enum" in leaf:
        return [value for value in leaf["enum"] if value != leaf.get("default")] + [
            leaf.get("default", leaf["enum"][0])
        ]
    match leaf.get("type", "string"):
        case "boolean":
            return [not leaf.get("default"), bool(leaf.get("default"))]
        case "integer":
            least, most = leaf.get("minimum", 0), leaf.get("maximum", 1 << 30)
            return [value for value in (2, 3, 1) if least <= value <= most]
        case "array":
            return [[value] for value in valid_values(leaf["items"])[:2]]
        case "object" if "additionalProperties" in leaf:
            return [{KEY: value} for value in valid_values(leaf["additionalProperties"])[:2]]
        case "object":
            return [copy.deepcopy(affinity) for affinity in _AFFINITIES]
        case _:
            pattern, longest = leaf.get("pattern", ""), leaf.get("maxLength", 1 << 20)
            return [text for text in _TEXTS if len(text) <= longest and re.search(pattern, text)]


def invalid_values(leaf: Spec) -> Iterator[Any]:
    if "enum" in leaf:
        yield "Nonsense" if leaf["type"] == "string" else 3
        return
    match leaf.get("type", "string"):
        case "boolean":
            yield "nonsense"
        case "integer":
            yield "nonsense"
            yield leaf["minimum"] - 1
            if "maximum" in leaf:
                yield leaf["maximum"] + 1
        case "array":
            yield "nonsense"
            yield [valid_values(leaf["items"])[0]] * (leaf["maxItems"] + 1)
            yield from ([value] for value in invalid_values(leaf["items"]))
        case "object" if "additionalProperties" in leaf:
            yield "nonsense"
            yield {f"key{i}": valid_values(leaf["additionalProperties"])[0] for i in range(leaf["maxProperties"] + 1)}
            yield from ({KEY: value} for value in invalid_values(leaf["additionalProperties"]))
        case "object":
            yield "nonsense"
        case _:
            yield {"a": 1}
            if "pattern" in leaf:
                yield "?"
            if leaf.get("minLength"):
                yield ""
            yield "1" * (leaf["maxLength"] + 1)


def _accepted(schema: Spec, path: Path, value: Any) -> Spec | None:
    """The smallest spec with this value that is taken, with one or two other fields beside it if it needs them."""
    alone = _built(schema, path, value)
    part = _at(schema, path[:-1])["properties"]
    beside = [
        (name, other)
        for name, sibling in part.items()
        if name != path[-1] and "properties" not in sibling and sibling.get("type") != "array"
        for other in valid_values(sibling)
    ]
    for number in range(3):
        for chosen in itertools.combinations(beside, number):
            spec = copy.deepcopy(alone)
            _part(spec, path[:-1]).update(chosen)
            if is_valid(spec):
                return spec
    return None


def _built(schema: Spec, path: Path, value: Any) -> Any:
    """The value in its place, with what is required beside it and nothing else."""
    if not path:
        return copy.deepcopy(value)
    head, rest = path[0], path[1:]
    if head == ITEM:
        return [_built(schema, rest, value)]
    made = {name: valid_values(schema["properties"][name])[0] for name in schema.get("required", ()) if name != head}
    inner = schema["properties"][head]
    return made | {head: _built(inner["items"] if rest[:1] == (ITEM,) else inner, rest, value)}


def _at(schema: Spec, path: Path) -> Spec:
    for key in path:
        schema = schema["items"] if key == ITEM else schema["properties"][key]
    return schema


def _part(spec: Spec, path: Path) -> Spec:
    found: Any = spec
    for key in path:
        found = found[0] if key == ITEM else found[key]
    return found


def _merge(into: Spec, other: Spec) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, list) and isinstance(into.get(key), list) and isinstance(value[0], dict):
            _merge(into[key][0], value[0])
        else:
            into[key] = copy.deepcopy(value)
