"""The CustomResourceDefinitions of LLMService and LLMPool, out of the models of resources.py. Pure.

pydantic writes JSON Schema with references, titles and `anyOf [X, null]`; the API server wants a structural schema:
everything in place,
OpenAPI's boolean `exclusiveMinimum`, no type of null. Rules across fields are the models' `cel_rules`.
"""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import yaml
from pydantic import BaseModel

from baton_operator.resources import GROUP, KIND, VERSION, CelRule, LLMPoolSpec, LLMService, parts_of, scope_of

Schema: TypeAlias = dict[str, Any]

_FIRST = ("description", "type")
_DROPPED = ("title", "$defs", "propertyNames", "additionalProperties", "x-baton-scope", "default", "exclusiveMinimum")


def llmservice_crd() -> Schema:
    schema = structural_schema(LLMService)
    properties = schema["properties"]
    properties["apiVersion"] = {"type": "string"}
    properties["kind"] = {"type": "string"}
    properties["metadata"] = {"type": "object"}
    properties["status"] = _service_status()
    schema["description"] = "An LLM served by a pool of prefill and a pool of decode workers behind one API."
    columns = [
        _column("Ready", '.status.conditions[?(@.type=="Ready")].status', "whether a probe of the API went through"),
        _column("Model", ".status.model", "the name that clients send"),
        _column("Prefill", ".status.pools.prefill.summary", "prefill workers, ready/wanted"),
        _column("Decode", ".status.pools.decode.summary", "decode workers, ready/wanted"),
        _column("Mode", ".status.mode", "who runs prompts"),
        _column("URL", ".status.url", "the API inside the cluster"),
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
        _column("Reason", '.status.conditions[?(@.type=="Ready")].reason', "why it is ready or not", priority=1),
        _column("Revision", ".status.servingRevision", "the revision that serves", priority=1),
    ]
    names = {"kind": KIND, "listKind": "LLMServiceList", "plural": "llmservices", "singular": "llmservice"}
    return _definition(names | {"shortNames": ["llm"], "categories": ["baton"]}, schema, columns, {"status": {}})


def llmpool_crd() -> Schema:
    spec = structural_schema(LLMPoolSpec)
    status = _object(
        "What the operator last saw.",
        replicas=_counted("workers that there are"),
        readyReplicas=_counted("workers that are ready"),
        selector=_text("label selector of the pods of the serving revision; what an HPA averages over"),
    )
    schema = {
        "type": "object",
        "description": "One pool of an LLMService: the object that kubectl scale, an HPA or KEDA scales.",
        "properties": {
            "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"},
            "spec": spec, "status": status,
        },
    }  # fmt: skip
    columns = [
        _column("Service", ".spec.serviceName", "the LLMService it belongs to"),
        _column("Role", ".spec.role", "what its workers do"),
        {"name": "Desired", "type": "integer", "jsonPath": ".spec.replicas"},
        {"name": "Ready", "type": "integer", "jsonPath": ".status.readyReplicas"},
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    ]
    scale = {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }
    names = {"kind": "LLMPool", "listKind": "LLMPoolList", "plural": "llmpools", "singular": "llmpool"}
    return _definition(names | {"categories": ["baton"]}, schema, columns, {"status": {}, "scale": scale})


def render() -> str:
    """Both definitions as YAML documents."""
    return yaml.dump_all([llmservice_crd(), llmpool_crd()], Dumper=_PlainDumper, sort_keys=False, width=120)


def structural_schema(part: type[BaseModel]) -> Schema:
    """A model's schema as the API server takes it."""
    schema = part.model_json_schema(by_alias=True)
    rules = {found.__name__: getattr(found, "cel_rules", ()) for found in _parts_below(part)}
    definitions = cast("dict[str, Schema]", schema.get("$defs", {}))
    return _structural(schema, definitions, rules)


# ---------------------------------------------------------------- parts


class _PlainDumper(yaml.SafeDumper):
    """Writes what occurs twice twice: anchors are for machines."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _parts_below(part: type[BaseModel]) -> set[type[BaseModel]]:
    inner = {found for field in part.model_fields.values() for found in parts_of(field.annotation)}
    return {part}.union(*(_parts_below(found) for found in inner))


def _structural(schema: Schema, definitions: dict[str, Schema], rules: dict[str, tuple[CelRule, ...]]) -> Schema:
    merged = _resolved(schema, definitions)
    kept = {key: merged[key] for key in (*_FIRST, *merged) if key in merged and key not in _DROPPED}
    _keep_limits(merged, kept)
    if "properties" in merged:
        kept["properties"] = {
            name: _structural(inner, definitions, rules) for name, inner in cast("Schema", merged["properties"]).items()
        }
        own = rules.get(str(merged.get("title")), ())
        if own:
            kept["x-kubernetes-validations"] = [{"rule": rule.rule, "message": rule.message} for rule in own]
    elif merged.get("additionalProperties") is True:
        kept["x-kubernetes-preserve-unknown-fields"] = True
    elif merged.get("additionalProperties"):
        kept["additionalProperties"] = _structural(merged["additionalProperties"], definitions, rules)
    if "items" in merged:
        kept["items"] = _structural(merged["items"], definitions, rules)
    _keep_default(merged, kept)
    if scope_of(merged) == "local":
        kept.pop("default", None)  # or every object of the cluster would state what it does not mean
        kept["description"] += " (local mode only)"
    return kept


def _resolved(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    """With references and `anyOf [X, null]` replaced by what they mean; what stands beside them wins."""
    if "$ref" in schema:
        beside = {key: value for key, value in schema.items() if key != "$ref"}
        return _resolved(definitions[str(schema["$ref"]).rpartition("/")[2]] | beside, definitions)
    if "anyOf" in schema:
        (choice,) = (choice for choice in cast("list[Schema]", schema["anyOf"]) if choice.get("type") != "null")
        beside = {key: value for key, value in schema.items() if key != "anyOf"}
        inner = _resolved(choice, definitions)
        return inner | beside | ({"title": inner["title"]} if "title" in inner else {})
    return schema


def _keep_limits(merged: Schema, kept: Schema) -> None:
    if "exclusiveMinimum" in merged:
        kept |= {"minimum": merged["exclusiveMinimum"], "exclusiveMinimum": True}


def _keep_default(merged: Schema, kept: Schema) -> None:
    """A part that may be left out is there with its own defaults, so that rules find it; nothing else is empty.

    The defaults are written out: the API server checks rules on a default as it stands, before it fills in parts of it.
    """
    default = merged.get("default")
    if "properties" in merged and default is not None:
        parts = cast("dict[str, Schema]", kept["properties"])
        kept["default"] = {name: part["default"] for name, part in parts.items() if "default" in part}
    elif isinstance(default, float):
        kept["default"] = f"{default:g}s"  # the only floats are durations
    elif default not in (None, [], {}):
        kept["default"] = default


def _definition(names: Schema, schema: Schema, columns: list[Schema], subresources: Schema) -> Schema:
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": subresources,
        "additionalPrinterColumns": columns,
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names['plural']}.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


def _column(name: str, path: str, description: str, *, priority: int = 0) -> Schema:
    column = {"name": name, "type": "string", "jsonPath": path, "description": description}
    return column | ({"priority": priority} if priority else {})


def _service_status() -> Schema:
    condition = _object(
        "One thing that is true, false or unknown of the service.",
        type=_text("what is said"),
        status=_text("whether it is so") | {"enum": ["True", "False", "Unknown"]},
        observedGeneration=_counted("the generation of the spec that was looked at"),
        lastTransitionTime=_text("when status changed last") | {"format": "date-time"},
        reason=_text("why, in one word"),
        message=_text("why, for people"),
    ) | {"required": ["type", "status", "lastTransitionTime", "reason", "message"]}
    pool = _object(
        "Workers of the serving revision.",
        replicas=_counted("workers wanted"),
        readyReplicas=_counted("workers ready"),
        summary=_text("ready/wanted"),
    )
    return _object(
        "What the operator last saw.",
        observedGeneration=_counted("the generation of the spec that was looked at"),
        model=_text("the name that clients send"),
        url=_text("the API inside the cluster"),
        mode=_text("who runs prompts"),
        revision=_text("the revision that the spec asks for"),
        servingRevision=_text("the revision that requests go to"),
        pools=_object("Both pools.", prefill=pool, decode=pool),
        conditions={
            "type": "array",
            "description": "Ready, PrefillReady, DecodeReady, GatewayReady, TransferReady, Progressing and Degraded.",
            "items": condition,
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["type"],
        },
    )


def _object(description: str, **properties: Schema) -> Schema:
    return {"type": "object", "description": description, "properties": properties}


def _text(description: str) -> Schema:
    return {"type": "string", "description": description}


def _counted(description: str) -> Schema:
    return {"type": "integer", "description": description}
