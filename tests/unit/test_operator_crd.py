"""The CRDs: structural, small, described, and with every rule that the models have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from baton_operator.crd import llmpool_crd, llmservice_crd, render
from baton_operator.resources import LLMService, parts_of


def schema_of(crd: dict[str, Any]) -> dict[str, Any]:
    return crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from nodes(inner, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}[]")


def spec_nodes() -> dict[str, dict[str, Any]]:
    return dict(nodes(schema_of(llmservice_crd())["properties"]["spec"], "spec"))


BOTH = [pytest.param(llmservice_crd(), id="LLMService"), pytest.param(llmpool_crd(), id="LLMPool")]


@pytest.mark.parametrize("crd", BOTH)
def test_a_schema_is_structural(crd: dict[str, Any]) -> None:
    for path, node in nodes(schema_of(crd)):
        assert "type" in node or node.get("x-kubernetes-int-or-string"), path
        assert not {"$ref", "$defs", "anyOf", "allOf", "oneOf", "title", "const", "x-baton-scope"} & set(node), path
        assert "default" not in node or node["default"] is not None, path
        assert isinstance(node.get("exclusiveMinimum", True), bool), path


@pytest.mark.parametrize("crd", BOTH)
def test_every_field_says_what_it_means(crd: dict[str, Any]) -> None:
    bare = [path for path, node in nodes(schema_of(crd)) if not node.get("description") and not path.endswith("[]")]
    assert bare == [".apiVersion", ".kind", ".metadata"]


def test_every_text_list_and_map_of_the_spec_has_a_limit() -> None:
    """Or the API server could not tell what a rule costs, and refuses the CRD."""
    for path, node in spec_nodes().items():
        if node.get("type") == "string" and "enum" not in node:
            assert "maxLength" in node, path
        if node.get("type") == "array":
            assert "maxItems" in node, path
        if "additionalProperties" in node:
            assert "maxProperties" in node, path


def test_every_rule_of_the_models_is_in_the_schema() -> None:
    def rules_of(part: Any) -> set[str]:
        inner = {found for field in part.model_fields.values() for found in parts_of(field.annotation)}
        return {rule.rule for rule in getattr(part, "cel_rules", ())}.union(*(rules_of(found) for found in inner))

    found = {
        rule["rule"]
        for _, node in nodes(schema_of(llmservice_crd()))
        for rule in node.get("x-kubernetes-validations", ())
    }
    assert found == rules_of(LLMService)
    assert len(found) > 10


def test_defaults_are_those_of_the_models_in_the_words_of_a_manifest() -> None:
    found = spec_nodes()
    assert found["spec"]["default"]["disaggregation"] == "Auto", "rules are checked on the default as it stands"
    assert found["spec"]["default"]["redis"] == {"mode": "Managed"}
    assert found["spec.model.source"]["default"] == "smollm2"
    assert found["spec.rollout.progressDeadline"]["default"] == "900s"
    assert found["spec.redis.mode"]["default"] == "Managed"
    assert "default" not in found["spec.pools.prefill.replicas"]
    assert "default" not in found["spec.gateway.port"], "a cluster's objects must not state what only local mode reads"
    assert found["spec.gateway.port"]["description"].endswith("(local mode only)")


def test_quantities_are_text_or_numbers() -> None:
    found = spec_nodes()
    assert found["spec.pools.decode.kvMemory"]["x-kubernetes-int-or-string"] is True
    assert found["spec.pools.decode.resources.limits[]"]["x-kubernetes-int-or-string"] is True


def test_columns_show_what_people_ask_first() -> None:
    version = llmservice_crd()["spec"]["versions"][0]
    columns = [column["name"] for column in version["additionalPrinterColumns"] if not column.get("priority")]
    assert columns == ["Ready", "Model", "Prefill", "Decode", "Mode", "URL", "Age"]
    assert llmservice_crd()["spec"]["names"]["shortNames"] == ["llm"]
    assert version["subresources"] == {"status": {}}


def test_a_pool_can_be_scaled() -> None:
    version = llmpool_crd()["spec"]["versions"][0]
    assert version["subresources"]["scale"] == {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }
    replicas = schema_of(llmpool_crd())["properties"]["spec"]["properties"]["replicas"]
    assert "default" not in replicas, "a default would scale a pool down when its owner changes"


def test_the_yaml_is_small_and_has_no_anchors() -> None:
    text = render()
    assert "&id" not in text
    assert len(text) < 50_000
    assert [document["metadata"]["name"] for document in yaml.safe_load_all(text)] == [
        "llmservices.serving.baton.dev",
        "llmpools.serving.baton.dev",
    ]
