"""What the API server takes for an LLMService: every rule across fields refuses its example, in its own words."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from baton_operator import crd
from baton_operator.resources import API_VERSION
from tests.cluster.kube import Cluster
from tests.cluster.operator_world import Admin, Namespace, install

SERVICES = "llmservices"
CREATED: list[tuple[str, dict[str, Any]]] = [
    ("model.claimName is mounted at /models", {"model": {"claimName": "models", "source": "smollm2"}}),
    (
        "operator Equal needs key",
        {"pools": {"decode": {"tolerations": [{"operator": "Exists", "key": "gpu", "value": "yes"}]}}},
    ),
    (
        "tolerationSeconds needs effect",
        {"pools": {"decode": {"tolerations": [{"key": "gpu", "tolerationSeconds": 9}]}}},
    ),
    ("replicas fixes the pool's size", {"pools": {"prefill": {"replicas": 1, "max": 2}}}),
    ("min is greater than max", {"pools": {"prefill": {"min": 3, "max": 2}}}),
    (
        "gateway takes httpRoute or ingress",
        {"gateway": {"httpRoute": {"parentName": "web"}, "ingress": {"host": "chat.example"}}},
    ),
    ("requireRDMA is true, but transfer grpc", {"requireRDMA": True, "transfer": "grpc"}),
    ("redis.mode External needs redis.urlSecret", {"redis": {"mode": "External"}}),
    ("a decode worker owns every request", {"pools": {"decode": {"replicas": 0}}}),
    ("disaggregation is Always", {"disaggregation": "Always", "pools": {"prefill": {"replicas": 0}}}),
    ("autoscaling is Fixed", {"autoscaling": "Fixed", "pools": {"decode": {"min": 2}}}),
]
CHANGED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("model.source cannot be changed", {}, {"model": {"source": "other/model"}}),
    (
        "model.claimName cannot be changed",
        {"model": {"claimName": "models", "source": "/models/a"}},
        {"model": {"claimName": "others", "source": "/models/a"}},
    ),
]
NAMED = ("metadata.name must begin with a letter", "1chat")


@pytest.fixture(scope="module")
def namespace(control_plane: Cluster) -> Iterator[Namespace]:
    if control_plane.ca_file is None:
        pytest.skip("needs a cluster of its own: the administrator's token is used directly")
    admin = Admin(control_plane)
    install(admin)
    made = Namespace(admin, f"schema-{os.urandom(3).hex()}")
    made.make()
    yield made
    made.remove()
    admin.close()


def create(namespace: Namespace, name: str, spec: dict[str, Any], query: str = "") -> tuple[int, Any]:
    manifest = {"apiVersion": API_VERSION, "kind": "LLMService", "metadata": {"name": name}, "spec": spec}
    status, answer = namespace.admin.answer("POST", namespace.path(API_VERSION, SERVICES) + query, manifest)
    return status, json.loads(answer)


@pytest.mark.parametrize(("words", "spec"), CREATED, ids=[words for words, _ in CREATED])
def test_a_spec_that_breaks_a_rule_is_refused(words: str, spec: dict[str, Any], namespace: Namespace) -> None:
    status, answer = create(namespace, "refused", spec)
    assert status == 422
    assert words in answer["message"]


@pytest.mark.parametrize(("words", "old", "new"), CHANGED, ids=[words for words, _, _ in CHANGED])
def test_what_cannot_be_changed_is_refused(
    words: str, old: dict[str, Any], new: dict[str, Any], namespace: Namespace
) -> None:
    name = f"changed-{os.urandom(3).hex()}"
    assert create(namespace, name, old)[0] == 201
    path = namespace.path(API_VERSION, SERVICES, name)
    status, answer = namespace.admin.answer("PATCH", path, {"spec": new}, "application/merge-patch+json")
    assert status == 422
    assert words in json.loads(answer)["message"]


def test_a_name_that_children_could_not_have_is_refused(namespace: Namespace) -> None:
    words, name = NAMED
    status, answer = create(namespace, name, {})
    assert status == 422
    assert words in answer["message"]


def test_every_rule_has_a_refused_example() -> None:
    """The message of each rule holds the words of exactly one example."""
    examples = [*(words for words, _ in CREATED), *(words for words, _, _ in CHANGED), NAMED[0]]
    messages = set(_messages(crd.llmservice_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]))
    assert {message: sum(words in message for words in examples) for message in messages} == dict.fromkeys(messages, 1)
    assert len(messages) == len(examples)


def _messages(schema: dict[str, Any]) -> Iterator[str]:
    yield from (rule["message"] for rule in schema.get("x-kubernetes-validations", ()))
    for inner in schema.get("properties", {}).values():
        yield from _messages(inner)
    if "items" in schema:
        yield from _messages(schema["items"])


def test_defaults_are_filled_in_and_unknown_fields_pruned(namespace: Namespace) -> None:
    status, made = create(namespace, "pruned", {"nonsense": 1, "engine": {"warp": 9}}, "?fieldValidation=Ignore")
    assert status == 201
    spec = copy.deepcopy(made["spec"])
    assert "nonsense" not in spec
    assert "warp" not in spec["engine"]
    assert (spec["disaggregation"], spec["rollout"]["strategy"], spec["redis"]["mode"]) == ("Auto", "Surge", "Managed")
    assert "replicas" not in spec["pools"]["decode"]


def test_unknown_fields_are_refused_where_the_client_asks_for_it(namespace: Namespace) -> None:
    status, answer = create(namespace, "strict", {"nonsense": 1}, "?fieldValidation=Strict")
    assert status == 400
    assert 'unknown field "spec.nonsense"' in answer["message"]


def test_explain_reads_well(namespace: Namespace, control_plane: Cluster) -> None:
    said = control_plane.kubectl("explain", "llm.spec.pools.decode")
    assert "workers that own requests and write the answers" in " ".join(said.split())
    assert "replicas" in said
