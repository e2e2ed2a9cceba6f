"""What an LLMService consists of: every field counts, every pod is restricted, every flag is known to its process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel

from baton_operator.desired import HTTP_ROUTE, INFERENCE_POOL, SERVICE_MONITOR, Platform, desire
from baton_operator.objects import Desired, Manifest, ref_of
from baton_operator.resources import API_VERSION, LLMService, parse_llm_service, parts_of, scope_of
from decode_service.config import DecodeConfig
from gateway.config import GatewayConfig
from prefill_service.config import PrefillConfig
from servicekit.config import build

PLATFORM = Platform("gateway:1", "worker:1", "worker-cuda:1", "redis:7", "baton-system")
ALL_APIS = replace(PLATFORM, apis=frozenset([SERVICE_MONITOR, HTTP_ROUTE, INFERENCE_POOL]))


def desired(spec: dict[str, Any] | None = None, platform: Platform = PLATFORM, name: str = "chat") -> Desired:
    metadata = {"name": name, "namespace": "ns"}
    document = {"apiVersion": API_VERSION, "kind": "LLMService", "metadata": metadata, "spec": spec or {}}
    return desire(parse_llm_service(document, where="test"), platform, uid="uid-1", generation=1)


def by_name(found: Desired) -> dict[str, Manifest]:
    return {f"{manifest['kind']}/{manifest['metadata']['name']}": manifest for manifest in found.manifests}


def worker(found: Desired, role: str) -> dict[str, Any]:
    return found.pools[role].deployment["spec"]["template"]["spec"]


def arguments(pod: dict[str, Any]) -> list[str]:
    return pod["containers"][0]["args"]


def pods(found: Desired) -> Iterator[dict[str, Any]]:
    for manifest in found.manifests:
        if manifest["kind"] == "Deployment":
            yield manifest["spec"]["template"]["spec"]


# ---------------------------------------------------------------- every field counts

POOL_CHANGES: dict[str, Any] = {
    "replicas": 3, "min": 2, "max": 5, "threads": 4, "kvMemory": "1Gi",
    "resources.requests": {"cpu": "2"}, "resources.limits": {"memory": "8Gi"}, "resources.gpus": 1,
    "resources.gpuResource": "amd.com/gpu", "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "gpu", "value": "a100"}],
    "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "topologySpreadConstraints": [{"maxSkew": 2}], "priorityClassName": "high",
    "podOverrides.labels": {"team": "a"}, "podOverrides.annotations": {"a": "b"}, "podOverrides.env": {"TZ": "UTC"},
    "podOverrides.runtimeClassName": "nvidia", "podOverrides.schedulerName": "volcano",
}  # fmt: skip
INGRESS, ROUTE = {"host": "llm.example.org"}, {"parentName": "edge"}
CHANGES: dict[str, Any] = {
    "model.source": "Qwen/Qwen2.5-0.5B-Instruct", "model.name": "chat", "model.claimName": "weights",
    "model.tokenSecret": "hf", "model.cacheClaimName": "cache",
    **{f"pools.prefill.{path}": value for path, value in POOL_CHANGES.items()},
    **{f"pools.decode.{path}": value for path, value in POOL_CHANGES.items()},
    "disaggregation": "Never", "deterministic": True, "objectives.ttft": "750ms", "autoscaling": "Fixed",
    "rollout.strategy": "Replace", "rollout.progressDeadline": "5m",
    "gateway.authSecret": "keys", "gateway.replicas": 2, "gateway.resources.requests": {"cpu": "1"},
    "gateway.resources.limits": {"memory": "1Gi"}, "gateway.resources.gpus": 1,
    "gateway.resources.gpuResource": "amd.com/gpu",
    "gateway.serviceType": "LoadBalancer", "gateway.maxQueueRequests": 7, "gateway.maxQueueTokens": 8,
    "gateway.httpRoute.parentName": "other", "gateway.httpRoute.parentNamespace": "edge",
    "gateway.httpRoute.sectionName": "https", "gateway.httpRoute.hostnames": ["llm.example.org"],
    "gateway.httpRoute.backend": "InferencePool", "gateway.ingress.host": "b.example.org",
    "gateway.ingress.className": "nginx", "gateway.ingress.tlsSecret": "tls",
    "engine.blockSize": 32, "engine.maxModelLen": 4096, "engine.maxNumSeqs": 9, "engine.maxBatchedTokens": 256,
    "engine.prefixCaching": False, "engine.dtype": "bfloat16", "engine.device": "cuda", "engine.kernels": "triton",
    "redis.mode": "None", "redis.urlSecret": "other",
    "image.gateway": "g@sha256:1", "image.worker": "w@sha256:2", "image.pullPolicy": "Always",
    "image.pullSecrets": ["pull"],
    "networkPolicies": False, "transfer": "nixl", "requireRDMA": True,
}  # fmt: skip
# What a field needs beside it to mean something.
BESIDE: dict[str, dict[str, Any]] = {
    "model.claimName": {"model.source": "/models/llama"},
    "redis.urlSecret": {"redis.mode": "External", "redis.urlSecret": "redis"},
    **{path: {"gateway.httpRoute": ROUTE} for path in CHANGES if path.startswith("gateway.httpRoute.")},
    **{path: {"gateway.ingress": INGRESS} for path in CHANGES if path.startswith("gateway.ingress.")},
    **{path: {path.replace("gpuResource", "gpus"): 1} for path in CHANGES if path.endswith(".gpuResource")},
}  # fmt: skip
LOCAL = {"gateway.host", "gateway.port", "gateway.apiKeysFile"}


def leaves(part: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, field in part.model_fields.items():
        here = f"{path}{field.alias or name}"
        inner = list(parts_of(field.annotation))
        is_list = "tuple" in str(field.annotation)
        if inner and not is_list:
            yield from leaves(inner[0], f"{here}.")
        else:
            yield here


def spec_of(values: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = {}
    for path, value in values.items():
        *parents, last = path.split(".")
        part = spec
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = dict(value) if isinstance(value, dict) else value
    return spec


def test_every_field_of_the_spec_is_in_the_table_of_changes() -> None:
    spec = next(parts_of(LLMService.model_fields["spec"].annotation))
    assert set(leaves(spec)) == set(CHANGES) | LOCAL


@pytest.mark.parametrize("path", CHANGES)
def test_changing_a_field_changes_what_is_desired(path: str) -> None:
    beside = BESIDE.get(path, {})
    before = desired(spec_of(beside), ALL_APIS)
    after = desired(spec_of({**beside, path: CHANGES[path]}), ALL_APIS)
    assert before != after


@pytest.mark.parametrize("path", sorted(LOCAL))
def test_a_field_of_local_mode_changes_nothing_but_a_warning(path: str) -> None:
    found = desired(spec_of({path: 9000 if path.endswith("port") else "x"}))
    assert found.manifests == desired().manifests
    assert found.warnings == (f"only local mode reads spec.{path}",)


def test_the_scopes_say_what_local_mode_does_not_read() -> None:
    gateway = next(parts_of(LLMService.model_fields["spec"].annotation)).model_fields["gateway"]
    fields = next(parts_of(gateway.annotation)).model_fields
    assert {field.alias for field in fields.values() if scope_of(field.json_schema_extra) == "local"} == {
        "host", "port", "apiKeysFile",
    }  # fmt: skip


# ---------------------------------------------------------------- revision

REPLICA_FIELDS = [f"pools.{role}.{field}" for role in ("prefill", "decode") for field in ("replicas", "min", "max")]


@pytest.mark.parametrize("path", [*REPLICA_FIELDS, "gateway.replicas", "gateway.maxQueueRequests", "rollout.strategy"])
def test_what_does_not_shape_worker_pods_keeps_the_revision(path: str) -> None:
    assert desired(spec_of({path: CHANGES[path]})).revision == desired().revision


@pytest.mark.parametrize(
    "path", ["image.worker", "engine.blockSize", "pools.prefill.threads", "deterministic", "transfer"]
)
def test_what_shapes_workers_of_either_pool_makes_one_new_revision_for_both(path: str) -> None:
    before, after = desired(), desired(spec_of({path: CHANGES[path]}))
    assert before.revision != after.revision
    for role, pool in after.pools.items():
        assert pool.deployment["metadata"]["name"] == f"chat-{role}-{after.revision}"
        assert arguments(worker(after, role))[-2:] == ["--revision", after.revision]
        assert pool.deployment["spec"]["selector"]["matchLabels"]["serving.baton.dev/revision"] == after.revision


def test_the_default_service_has_the_revision_that_it_had() -> None:
    """If this changes, an upgrade of the operator restarts every worker of every service: say so in CHANGELOG.md."""
    assert desired().revision == "42478298"


# ---------------------------------------------------------------- pools


def test_replicas_are_nobodys_business_here() -> None:
    for role in ("prefill", "decode"):
        found = desired({"pools": {role: {"replicas": 3}}}).pools[role]
        assert "replicas" not in found.deployment["spec"]
        assert "replicas" not in found.pool["spec"]
        assert (found.replicas, found.seed, found.clamp(9)) == (3, 3, 3)


def test_a_pool_that_states_no_replicas_is_seeded_at_its_minimum_and_kept_within_its_bounds() -> None:
    found = desired({"pools": {"decode": {"min": 2, "max": 5}}}).pools["decode"]
    assert (found.replicas, found.seed, found.clamp(0), found.clamp(4), found.clamp(9)) == (None, 2, 2, 4, 5)


def test_fixed_pools_are_the_operators() -> None:
    assert desired({"autoscaling": "Fixed"}).pools["decode"].replicas == 1


# ---------------------------------------------------------------- pods


@pytest.mark.parametrize("redis", ["Managed", "None"])
def test_every_pod_is_restricted(redis: str) -> None:
    for pod in pods(desired({"redis": {"mode": redis}})):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
            }  # fmt: skip
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]


def test_every_mount_has_its_volume_and_every_volume_is_mounted() -> None:
    stated = {"model": {"source": "/models/llama", "claimName": "weights"}, "gateway": {"authSecret": "keys"}}
    for spec in ({}, stated, {"redis": {"mode": "External", "urlSecret": "redis"}}, {"redis": {"mode": "None"}}):
        for pod in pods(desired(spec)):
            containers = (*pod["containers"], *pod.get("initContainers", ()))
            mounted = {mount["name"] for container in containers for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_probes_ask_the_health_ports() -> None:
    found = desired()
    for role in ("prefill", "decode"):
        (container,) = worker(found, role)["containers"]
        paths = {name: container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
        assert paths == {
            "startupProbe": {"path": "/startupz", "port": 7001},
            "livenessProbe": {"path": "/livez", "port": 7001},
            "readinessProbe": {"path": "/readyz", "port": 7001},
        }
    assert found.gateway["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["port"] == 8000


def test_a_pod_outlives_its_drain() -> None:
    for pod in (
        *(worker(desired(), role) for role in ("prefill", "decode")),
        desired().gateway["spec"]["template"]["spec"],
    ):
        assert pod["terminationGracePeriodSeconds"] == 45


def test_every_flag_is_known_to_the_process_that_gets_it() -> None:
    spec = spec_of(
        {
            path: value
            for path, value in CHANGES.items()
            if path.startswith(
                (
                    "engine.",
                    "deterministic",
                    "disagg",
                    "objectives",
                    "gateway.max",
                    "gateway.auth",
                    "transfer",
                    "require",
                )
            )
            or path.endswith((".threads", ".kvMemory"))
        }
    )
    for stated in ({}, spec, {"redis": {"mode": "External", "urlSecret": "redis"}}, {"redis": {"mode": "None"}}):
        found = desired(stated)
        for config, pod in (
            (PrefillConfig, worker(found, "prefill")),
            (DecodeConfig, worker(found, "decode")),
            (GatewayConfig, found.gateway["spec"]["template"]["spec"]),
        ):
            given = [
                argument.replace("$(POD_NAME)", "pod").replace("$(POD_IP)", "198.18.1.2") for argument in arguments(pod)
            ]
            assert build(config, given, {}).model_id == "smollm2"


def test_a_gpu_pool_has_the_image_and_the_resource_for_it() -> None:
    found = desired({"pools": {"decode": {"resources": {"gpus": 2, "limits": {"memory": "64Gi"}}}}})
    (container,) = worker(found, "decode")["containers"]
    assert container["image"] == "worker-cuda:1"
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": "2"}
    assert container["resources"]["requests"]["memory"] == "64Gi"
    assert "--device cuda" in " ".join(container["args"])
    (other,) = worker(found, "prefill")["containers"]
    assert (other["image"], "--device" in other["args"]) == ("worker:1", False)


GPUS = {"resources": {"gpus": 1}}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"pools": {"prefill": GPUS, "decode": GPUS}}, ()),
        ({"pools": {"decode": GPUS}, "disaggregation": "Never"}, ()),
        ({"engine": {"device": "cuda"}}, ()),
        ({"pools": {"decode": GPUS}}, ("one of spec.pools has GPUs and the other has none",)),
        (
            {"pools": {"prefill": GPUS, "decode": {"resources": {"gpus": 4}}}},
            ("spec.pools.decode.resources.gpus is 4, but a worker uses one GPU",),
        ),
        (
            {"pools": {"decode": GPUS}, "engine": {"device": "cpu"}},
            ("spec.pools.decode.resources.gpus is 1, but spec.engine.device is cpu",),
        ),
        (
            {"pools": {"decode": GPUS}, "engine": {"kernels": "native"}},
            ("spec.pools.decode.resources.gpus is 1, but spec.engine.kernels is native",),
        ),
    ],
)
def test_gpus_that_would_lie_idle_are_warned_of(spec: dict[str, Any], words: tuple[str, ...]) -> None:
    found = desired(spec).warnings
    assert len(found) == len(words)
    assert all(warning.startswith(each) for warning, each in zip(found, words, strict=True))


def test_a_model_in_the_image_or_on_a_claim_is_not_fetched() -> None:
    pod = worker(desired({"model": {"source": "/models/llama", "claimName": "weights"}}), "decode")
    assert "initContainers" not in pod
    assert arguments(pod)[:2] == ["--model", "/models/llama"]
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in pod["containers"][0]["volumeMounts"]


def test_a_model_of_the_hub_is_fetched_with_its_token_before_the_worker_starts() -> None:
    pod = worker(desired({"model": {"source": "org/model", "tokenSecret": "hf"}}), "prefill")
    (fetch,) = pod["initContainers"]
    assert fetch["command"][2:] == ["baton", "pull", "org/model", "--link", "/tmp/model"]
    assert fetch["env"][-1] == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}}
    assert "HF_TOKEN" not in json.dumps(pod["containers"])


def test_a_gateway_fetches_no_weights() -> None:
    (fetch,) = desired({"model": {"source": "org/model"}}).gateway["spec"]["template"]["spec"]["initContainers"]
    assert fetch["command"][2:] == ["baton", "pull", "org/model", "--link", "/tmp/model", "--only", "tokenizer"]


def test_overrides_cannot_take_what_is_batons() -> None:
    stated = {
        "podOverrides": {"env": {"POD_NAME": "other", "TZ": "UTC"}, "labels": {"app.kubernetes.io/name": "other"}}
    }
    found = desired({"pools": {"decode": stated}})
    names = [variable["name"] for variable in worker(found, "decode")["containers"][0]["env"]]
    assert names.count("POD_NAME") == 1
    assert names[-1] == "TZ"
    assert (
        found.pools["decode"].deployment["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"] == "baton"
    )


# ---------------------------------------------------------------- what is around them


def test_every_object_is_owned_labelled_and_within_kubernetes_limits_of_names() -> None:
    name = "a" * 40
    found = desired({"gateway": {"httpRoute": ROUTE}}, ALL_APIS, name)
    manifests = [*found.manifests, *(secret.manifest for secret in found.secrets)]
    assert len({ref_of(manifest) for manifest in manifests}) == len(manifests)
    for manifest in manifests:
        metadata = manifest["metadata"]
        assert len(metadata["name"]) <= 63
        assert metadata["namespace"] == "ns"
        (owner,) = metadata["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == ("uid-1", True)
        assert metadata["labels"]["serving.baton.dev/service"] == name


def test_nothing_is_empty_that_the_api_server_would_drop() -> None:
    def empties(value: Any, path: str) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                if inner in ([], {}, None) and key not in ("emptyDir", "namespaceSelector"):
                    yield f"{path}.{key}"
                yield from empties(inner, f"{path}.{key}")
        elif isinstance(value, list | tuple):
            for inner in value:
                yield from empties(inner, path)

    for manifest in desired({"gateway": {"httpRoute": ROUTE}}, ALL_APIS).manifests:
        assert list(empties(manifest, manifest["kind"])) == []


def test_policies_let_through_the_matrix_and_nothing_else() -> None:
    found = by_name(desired())
    everything = found["NetworkPolicy/chat-default"]["spec"]
    assert everything == {
        "podSelector": {"matchLabels": {"serving.baton.dev/service": "chat"}}, "policyTypes": ["Ingress", "Egress"],
    }  # fmt: skip

    def ports(policy: str, direction: str) -> list[int]:
        rules = found[f"NetworkPolicy/chat-{policy}"]["spec"].get(direction, [])
        return sorted({port["port"] for rule in rules for port in rule["ports"]})

    assert (ports("gateway", "ingress"), ports("gateway", "egress")) == ([8000, 8001], [53, 443, 6379, 7000])
    assert (ports("decode", "ingress"), ports("decode", "egress")) == ([7000, 7001], [53, 443, 6379, 7000])
    assert (ports("redis", "ingress"), ports("redis", "egress")) == ([6379], [])


def test_a_model_on_disk_needs_no_way_out() -> None:
    found = by_name(desired({"model": {"source": "/opt/model"}, "redis": {"mode": "None"}}))
    rules = found["NetworkPolicy/chat-decode"]["spec"]["egress"]
    assert sorted({port["port"] for rule in rules for port in rule["ports"]}) == [53, 7000]


def test_the_ports_of_ucx_are_open_between_workers_only_where_nixl_may_use_tcp() -> None:
    for spec, is_open in (
        ({}, False), ({"transfer": "grpc"}, False), ({"requireRDMA": True}, False),
        ({"transfer": "nixl", "requireRDMA": True}, False), ({"transfer": "nixl"}, True),
    ):  # fmt: skip
        found = desired(spec)
        ranges = {
            (policy["metadata"]["name"], direction, str(rule.get("from", rule.get("to"))).count("decode"))
            for policy in found.manifests
            if policy["kind"] == "NetworkPolicy"
            for direction in ("ingress", "egress")
            for rule in policy["spec"].get(direction, ())
            if {"protocol": "TCP", "port": 7100, "endPort": 7199} in rule.get("ports", ())
        }
        both = {(f"chat-{role}", direction, 1) for role in ("prefill", "decode") for direction in ("ingress", "egress")}
        assert ranges == (both if is_open else set()), spec
        told = {variable["name"]: variable.get("value") for variable in worker(found, "decode")["containers"][0]["env"]}
        assert told.get("UCX_TCP_PORT_RANGE") == ("7100-7199" if is_open else None), spec


def test_the_internal_port_is_not_on_the_service_that_may_be_public() -> None:
    found = by_name(desired({"gateway": {"serviceType": "LoadBalancer"}}))
    assert [port["port"] for port in found["Service/chat"]["spec"]["ports"]] == [80]
    assert found["Service/chat-gateway"]["spec"]["clusterIP"] == "None"


def test_optional_apis_are_used_where_they_exist_and_missed_aloud_where_they_do_not() -> None:
    spec = {"gateway": {"httpRoute": {"parentName": "edge", "backend": "InferencePool"}}}
    kinds = {manifest["kind"] for manifest in desired(spec, ALL_APIS).manifests}
    assert kinds >= {"HTTPRoute", "InferencePool", "ServiceMonitor"}
    found = desired(spec)
    assert not {manifest["kind"] for manifest in found.manifests} & {"HTTPRoute", "InferencePool", "ServiceMonitor"}
    assert len(found.warnings) == 2


def test_gateways_know_where_to_find_workers_without_redis() -> None:
    given = arguments(desired().gateway["spec"]["template"]["spec"])
    assert given[given.index("--registry-dns") + 1] == "chat-prefill.ns.svc:7000,chat-decode.ns.svc:7000"
    assert given[given.index("--routing-file") + 1] == "/etc/baton/routing/routing.json"
