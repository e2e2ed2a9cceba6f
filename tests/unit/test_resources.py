"""LLMService: what is accepted, what is refused, and that refusals say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from baton_operator.resources import (
    API_VERSION,
    Disaggregation,
    LLMService,
    ResourceError,
    fields_unused,
    live_service,
    parse_duration,
    parse_llm_service,
    parse_quantity,
)

ROOT = Path(__file__).parents[2]


def document(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": "LLMService", "metadata": {"name": "chat"}, "spec": spec}


def refusal(given: object) -> str:
    with pytest.raises(ResourceError) as caught:
        parse_llm_service(given, where="chat.yaml")
    return str(caught.value)


def test_the_example_file_is_the_default_service() -> None:
    example = yaml.safe_load((ROOT / "examples" / "llmservice.yaml").read_text())
    assert parse_llm_service(example, where="examples/llmservice.yaml") == LLMService()


def test_every_field_of_a_full_service_is_read() -> None:
    service = parse_llm_service(
        document(
            model={"source": "Qwen/Qwen2.5-0.5B-Instruct", "name": "qwen"},
            pools={"prefill": {"replicas": 2, "threads": 3}, "decode": {"replicas": 4, "kvMemory": "1.5Gi"}},
            disaggregation="Always",
            deterministic=True,
            objectives={"ttft": "1m500ms"},
            gateway={
                "port": 9000,
                "host": "0.0.0.0",
                "apiKeysFile": "keys",
                "maxQueueRequests": 5,
                "maxQueueTokens": 6,
            },
            engine={
                "blockSize": 32,
                "maxModelLen": 4096,
                "maxNumSeqs": 8,
                "maxBatchedTokens": 256,
                "dtype": "bfloat16",
            },
        ),
        where="chat.yaml",
    )
    assert service.metadata.name == "chat"
    assert service.spec.pools.decode.kv_memory == 1536 * 2**20
    assert service.spec.objectives.ttft == pytest.approx(60.5)
    assert service.spec.disaggregation is Disaggregation.ALWAYS
    assert service.spec.engine.block_size == 32
    assert service.spec.gateway.api_keys_file == "keys"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"pools": {"decode": {"replicas": 65}}}, ("spec.pools.decode.replicas = 65", "at most 64")),
        ({"pools": {"decode": {"replicas": -1}}}, ("spec.pools.decode.replicas = -1", "at least 0")),
        ({"pools": {"decode": {"replicas": 0}}}, ("pools.decode.replicas is 0", "give at least 1")),
        ({"pools": {"decode": {"kvMemory": "2 GiBs"}}}, ("spec.pools.decode.kvMemory = '2 GiBs'", "2Gi")),
        ({"pools": {"decode": {"kvMemory": 0}}}, ("spec.pools.decode.kvMemory", "more than 0")),
        ({"objectives": {"ttft": 2}}, ("spec.objectives.ttft = 2", "500ms")),
        ({"objectives": {"ttft": "0s"}}, ("spec.objectives.ttft", "more than 0")),
        ({"engine": {"blockSize": 24}}, ("spec.engine.blockSize = 24", "power of two")),
        ({"engine": {"dtype": "int8"}}, ("spec.engine.dtype = 'int8'", "'float32' or 'bfloat16'")),
        ({"model": 5}, ("spec.model = 5 is not a mapping", "its keys: cacheClaimName, claimName, name, source")),
        ({"pools": {"decode": [2]}}, ("spec.pools.decode = [2] is not a mapping", "kvMemory, max, min")),
        ({"disaggregation": "Sometimes"}, ("spec.disaggregation = 'Sometimes'", "'Auto', 'Always' or 'Never'")),
        ({"gateway": {"port": 70000}}, ("spec.gateway.port = 70000", "at most 65535")),
        (
            {"disaggregation": "Always", "pools": {"prefill": {"replicas": 0}}},
            ("disaggregation is Always", "pools.prefill.replicas is 0"),
        ),
    ],
)
def test_a_refusal_names_field_value_limit_and_what_to_do(spec: dict[str, Any], words: tuple[str, ...]) -> None:
    message = refusal(document(**spec))
    assert message.startswith("chat.yaml: ")
    for word in words:
        assert word in message


def test_an_unknown_key_is_refused_with_the_known_ones_and_the_closest() -> None:
    message = refusal(document(pools={"decode": {"replica": 2}}))
    assert "spec.pools.decode.replica: unknown key; did you mean replicas?" in message
    assert "known keys of spec.pools.decode: affinity, kvMemory, max, min," in message


def test_an_unknown_key_inside_a_list_or_an_optional_part_is_explained_too() -> None:
    assert "did you mean key?" in refusal(document(pools={"decode": {"tolerations": [{"keys": "gpu"}]}}))
    assert "did you mean host?" in refusal(document(gateway={"ingress": {"hosts": "llm.example.org"}}))


def test_snake_case_keys_are_unknown() -> None:
    assert "did you mean blockSize?" in refusal(document(engine={"block_size": 16}))


def test_every_mistake_gets_its_own_line() -> None:
    message = refusal(document(pools={"decode": {"replicas": 65}}, gateway={"port": 0}))
    assert len(message.splitlines()) == 2


def test_a_name_that_is_no_dns_label_is_refused() -> None:
    assert "metadata.name = 'My Service'" in refusal(document() | {"metadata": {"name": "My Service"}})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["a"], "expected an LLMService"),
        (None, "expected an LLMService"),
        ({"spec": {}}, "apiVersion and kind missing"),
        ({"apiVersion": "v1", "kind": "Pod"}, "apiVersion = 'v1'"),
    ],
)
def test_another_document_is_refused(given: object, words: str) -> None:
    assert words in refusal(given)


@pytest.mark.parametrize(("text", "num_bytes"), [("64Mi", 2**26), ("1G", 10**9), (12, 12), ("0.5Ki", 512)])
def test_quantities_are_read_as_kubernetes_reads_them(text: object, num_bytes: int) -> None:
    assert parse_quantity(text) == num_bytes


@pytest.mark.parametrize("text", ["", "Mi", "-1", "1e3", True, None, 1.5, []])
def test_what_is_no_quantity_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="amount of memory"):
        parse_quantity(text)


@pytest.mark.parametrize(("text", "seconds"), [("250ms", 0.25), ("2s", 2.0), ("1h1m1s", 3661.0), ("0.5s", 0.5)])
def test_durations_are_read_with_their_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "5 s", "s", "1d", "1s foo"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


def test_fields_of_the_other_mode_are_accepted_and_named() -> None:
    service = parse_llm_service(
        document(
            pools={
                "decode": {"replicas": 2, "resources": {"gpus": 1}, "tolerations": [{"key": "gpu", "value": "a100"}]}
            },
            gateway={"port": 9000, "httpRoute": {"parentName": "edge"}},
            redis={"mode": "None"},
        ),
        where="chat.yaml",
    )
    assert fields_unused(service, mode="local") == (
        "spec.pools.decode.resources.gpus",
        "spec.pools.decode.tolerations",
        "spec.gateway.httpRoute.parentName",
        "spec.redis.mode",
    )
    assert fields_unused(service, mode="cluster") == ("spec.gateway.port",)


def test_a_live_object_is_read_without_what_the_api_server_added() -> None:
    body = document(deterministic=True)
    body["metadata"] |= {"namespace": "ns", "uid": "u", "managedFields": [{"manager": "kubectl"}], "generation": 3}
    assert live_service(body | {"status": {}}).spec.deterministic


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"pools": {"decode": {"replicas": 2, "min": 1}}}, "replicas fixes the pool's size"),
        ({"pools": {"decode": {"min": 3, "max": 2}}}, "min is greater than max: 3 > 2"),
        ({"pools": {"decode": {"min": 0}}}, "pools.decode.min is 0"),
        ({"disaggregation": "Always", "pools": {"prefill": {"min": 0}}}, "pools.prefill.min is 0"),
        ({"autoscaling": "Fixed", "pools": {"prefill": {"max": 4}}}, "state replicas of the pools, not min or max"),
        ({"transfer": "grpc", "requireRDMA": True}, "requireRDMA is true, but transfer grpc is TCP"),
        ({"transfer": "tcp"}, "spec.transfer = 'tcp' is not known; use 'auto', 'grpc' or 'nixl'"),
        ({"model": {"source": "smollm2", "claimName": "weights"}}, "must be a path that begins with /models/"),
        ({"redis": {"mode": "External"}}, "redis.mode External needs redis.urlSecret"),
        ({"redis": {"urlSecret": "redis"}}, "redis.mode External needs redis.urlSecret"),
        (
            {"gateway": {"ingress": {"host": "llm.example.org"}, "httpRoute": {"parentName": "edge"}}},
            "gateway takes httpRoute or ingress, not both",
        ),
        ({"pools": {"decode": {"tolerations": [{"operator": "Exists", "value": "x"}]}}}, "with Exists takes no value"),
        ({"pools": {"decode": {"tolerations": [{"value": "x"}]}}}, "operator Equal needs key"),
        ({"pools": {"decode": {"resources": {"limits": {"memory": "much"}}}}}, "is not an amount; write for example"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(spec: dict[str, Any], words: str) -> None:
    assert words in refusal(document(**spec))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({}, "smollm2"),
        ({"source": "Qwen/Qwen2.5-0.5B-Instruct"}, "Qwen/Qwen2.5-0.5B-Instruct"),
        ({"source": "/models/llama.gguf"}, "llama"),
        ({"source": "/models/llama/"}, "llama"),
        ({"source": "/models/llama", "name": "chat"}, "chat"),
    ],
)
def test_clients_call_a_model_by_its_source_unless_it_is_named(model: dict[str, str], name: str) -> None:
    assert parse_llm_service(document(model=model), where="chat.yaml").spec.model.served_name == name
