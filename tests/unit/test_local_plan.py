"""LLMService + machine -> processes: exact shares, exact flags, refusals with the field that would help."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.local.errors import PlanError
from baton.local.plan import (
    DEFAULT_KV_BYTES,
    GATEWAY_BYTES,
    MIB,
    MIN_KV_BYTES,
    USABLE_SHARE,
    WORKER_RUNTIME_BYTES,
    Machine,
    ModelFacts,
    Plan,
    ProcessSpec,
    Role,
    RunPaths,
    plan_added_worker,
    plan_service,
)
from baton_operator.resources import API_VERSION, LLMService, parse_llm_service

MODEL = ModelFacts(Path("/models/tiny.gguf"), "tiny", weight_bytes=500 * MIB, kv_bytes_per_token=46080)
PATHS = RunPaths(Path("/run/registry"), Path("/run/secret"))
LAPTOP = Machine(cpus=8, memory_bytes=16384 * MIB)


def service(**spec: Any) -> LLMService:
    document = {"apiVersion": API_VERSION, "kind": "LLMService", "spec": spec}
    return parse_llm_service(document, where="test")


def plan(machine: Machine = LAPTOP, **spec: Any) -> Plan:
    return plan_service(service(**spec), machine, MODEL, PATHS)


def flags(process: ProcessSpec) -> dict[str, str]:
    """Flags with their values; a switch has the value ""."""
    found: dict[str, str] = {}
    for argument in process.arguments:
        if argument.startswith("--"):
            found[argument] = ""
        else:
            found[list(found)[-1]] = argument
    return found


def by_id(planned: Plan) -> dict[str, ProcessSpec]:
    return {process.worker_id: process for process in planned.processes}


def test_the_default_service_is_a_gateway_a_prefill_and_a_decode_worker() -> None:
    planned = plan()
    assert [process.worker_id for process in planned.processes] == ["gateway", "prefill-0", "decode-0"]
    assert [process.module for process in planned.processes] == ["gateway", "prefill_service", "decode_service"]


def test_cpus_are_divided_equally_and_every_worker_has_one() -> None:
    pools = {"prefill": {"replicas": 1}, "decode": {"replicas": 2}}
    for cpus, threads in ((8, 2), (2, 1), (0.5, 1), (12, 4)):
        planned = by_id(plan(Machine(cpus, LAPTOP.memory_bytes), pools=pools))
        assert [flags(planned[name])["--threads"] for name in ("prefill-0", "decode-0", "decode-1")] == [
            str(threads)
        ] * 3


def test_a_share_holds_one_sequence_of_the_greatest_length() -> None:
    """350 MiB of KV for SmolLM2's 8,192 tokens of 45 KiB each once put four workers into a crash loop."""
    model = replace(MODEL, max_model_len=8192)
    pools = {"prefill": {"replicas": 2}, "decode": {"replicas": 2}}
    taken = GATEWAY_BYTES + model.weight_bytes + 4 * WORKER_RUNTIME_BYTES
    small, smaller = (Machine(2, int((taken + 4 * each * MIB) / USABLE_SHARE)) for each in (500, 350))
    planned = by_id(plan_service(service(pools=pools), small, model, PATHS))
    assert all(int(flags(planned[name])["--kv-memory"]) >= 8192 * 46080 for name in planned if name != "gateway")
    with pytest.raises(PlanError, match="maxModelLen"):
        plan_service(service(pools=pools), smaller, model, PATHS)
    planned = by_id(plan_service(service(pools=pools, engine={"maxModelLen": 2048}), smaller, model, PATHS))
    assert flags(planned["decode-1"])["--max-model-len"] == "2048"


def test_stated_threads_are_taken_before_the_rest_is_divided() -> None:
    planned = by_id(plan(pools={"prefill": {"threads": 5}, "decode": {"replicas": 3}}))
    assert flags(planned["prefill-0"])["--threads"] == "5"
    assert flags(planned["decode-2"])["--threads"] == "1"


def test_half_of_the_memory_that_weights_and_runtime_leave_is_divided_equally_as_kv() -> None:
    machine = Machine(cpus=4, memory_bytes=6144 * MIB)
    left = int(6144 * MIB * USABLE_SHARE) - GATEWAY_BYTES - MODEL.weight_bytes - 2 * WORKER_RUNTIME_BYTES
    planned = by_id(plan(machine))
    assert flags(planned["decode-0"])["--kv-memory"] == str(left // 4 // MIB * MIB)
    assert flags(planned["decode-0"])["--kv-memory"] == flags(planned["prefill-0"])["--kv-memory"]


def test_a_big_machine_does_not_give_more_than_the_default_unless_asked() -> None:
    planned = by_id(plan(Machine(64, 512 * 1024 * MIB), pools={"decode": {"kvMemory": "100Gi"}}))
    assert planned["prefill-0"].share is not None
    assert planned["prefill-0"].share.kv_bytes == DEFAULT_KV_BYTES
    assert flags(planned["decode-0"])["--kv-memory"] == str(100 * 1024 * MIB)


def test_a_machine_that_is_too_small_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(PlanError, match=r"1,500 MiB less .* run fewer spec\.pools"):
        plan(Machine(2, 1500 * MIB))


def test_kv_memory_that_does_not_hold_the_longest_request_is_refused_with_what_would_do() -> None:
    model = replace(MODEL, max_model_len=2048)

    def plan_with(kv_memory: str, replicas: int = 1, **spec: Any) -> None:
        spec["pools"] = {"prefill": {"kvMemory": kv_memory, "replicas": replicas}}
        plan_service(service(**spec), LAPTOP, model, PATHS)

    words = (
        r"^spec\.pools\.prefill\.kvMemory = 1 MiB holds 22 tokens, .* 2048, which need 90 MiB; give at least 90Mi or .*"
        r"spec\.engine\.maxModelLen"
    )
    with pytest.raises(PlanError, match=words):
        plan_with("1Mi")
    with pytest.raises(PlanError, match="give at least 90Mi"):
        plan_with("89Mi")
    plan_with("90Mi")
    plan_with("1Mi", engine={"maxModelLen": 22})
    with pytest.raises(PlanError, match="may have 22, which need 2 MiB"):
        plan_with("1Mi", engine={"maxModelLen": 22, "blockSize": 16})
    plan_with("1Mi", replicas=0)


def test_more_kv_memory_than_there_is_is_refused() -> None:
    with pytest.raises(PlanError, match=r"kvMemory asks for 20,480 MiB .* left for KV"):
        plan(pools={"decode": {"replicas": 2, "kvMemory": "10Gi"}})


def test_the_arithmetic_is_said() -> None:
    words = "\n".join(plan().arithmetic)
    assert "8 CPUs (given), divided among 2 workers: 4 each" in words
    assert "less 300 MiB for the gateway, 500 MiB for weights that all workers share and 2 x 600 MiB runtime" in words


def test_what_the_service_leaves_open_is_the_processes_own_default() -> None:
    worker = flags(by_id(plan())["decode-0"])
    assert "--block-size" not in worker
    assert "--deterministic" not in worker
    assert "--transports" not in worker
    gateway = flags(by_id(plan())["gateway"])
    assert "--api-key-file" not in gateway
    assert "--ttft-objective" not in gateway


def test_every_stated_field_reaches_the_processes_that_read_it() -> None:
    planned = by_id(
        plan(
            deterministic=True,
            disaggregation="Always",
            transfer="nixl",
            requireRDMA=True,
            objectives={"ttft": "750ms"},
            gateway={
                "host": "0.0.0.0", "port": 9000, "apiKeysFile": "keys", "maxQueueRequests": 7, "maxQueueTokens": 8,
            },
            engine={
                "blockSize": 32, "maxModelLen": 4096, "maxNumSeqs": 9, "maxBatchedTokens": 256,
                "prefixCaching": False, "dtype": "bfloat16",
            },
        )
    )  # fmt: skip
    gateway, prefill, decode = (flags(planned[name]) for name in ("gateway", "prefill-0", "decode-0"))
    assert gateway["--http"] == "0.0.0.0:9000"
    assert gateway["--ttft-objective"] == "0.75"
    assert (gateway["--api-key-file"], gateway["--max-queue-requests"], gateway["--max-queue-tokens"]) == (
        "keys",
        "7",
        "8",
    )
    assert gateway["--disaggregation"] == decode["--disaggregation"] == "always"
    assert "--disaggregation" not in prefill
    for worker in (prefill, decode):
        assert worker["--block-size"] == "32"
        assert worker["--max-model-len"] == "4096"
        assert worker["--max-num-seqs"] == "9"
        assert worker["--max-num-batched-tokens"] == "256"
        assert worker["--dtype"] == "bfloat16"
        assert worker["--transports"] == "nixl"
        assert "--require-rdma" in worker
        assert "--no-prefix-caching" in worker
    assert all("--deterministic" in part for part in (gateway, prefill, decode))


def test_all_processes_share_model_secret_and_registry() -> None:
    for process in plan().processes:
        found = flags(process)
        assert (found["--model"], found["--model-id"]) == ("/models/tiny.gguf", "tiny")
        assert (found["--secret-file"], found["--registry-dir"]) == ("/run/secret", "/run/registry")


def test_an_added_worker_gets_the_share_of_a_service_that_had_it_from_the_start() -> None:
    added = plan_added_worker(service(), LAPTOP, MODEL, PATHS, Role.DECODE, 1, plan().processes)
    assert added.worker_id == "decode-1"
    assert flags(added)["--threads"] == "2"
    assert added.share is not None
    assert added.share.kv_bytes >= MIN_KV_BYTES


def test_a_small_laptop_can_scale_the_default_service() -> None:
    laptop = Machine(cpus=4, memory_bytes=8192 * MIB)
    added = plan_added_worker(service(), laptop, MODEL, PATHS, Role.DECODE, 1, plan(laptop).processes)
    assert added.share is not None
    assert added.share.kv_bytes >= 256 * MIB


def test_a_worker_that_does_not_fit_is_not_added() -> None:
    small = Machine(cpus=2, memory_bytes=3500 * MIB)
    with pytest.raises(PlanError, match=r"no memory for decode-1: .* smaller spec\.pools\.\*\.kvMemory"):
        plan_added_worker(service(), small, MODEL, PATHS, Role.DECODE, 1, plan(small).processes)


@given(
    cpus=st.floats(0.1, 256),
    memory_mib=st.integers(512, 1 << 20),
    prefill=st.integers(0, 8),
    decode=st.integers(1, 8),
)
def test_no_plan_ever_hands_out_more_memory_than_is_usable(
    cpus: float, memory_mib: int, prefill: int, decode: int
) -> None:
    machine = Machine(cpus, memory_mib * MIB)
    pools = {"prefill": {"replicas": prefill}, "decode": {"replicas": decode}}
    try:
        planned = plan(machine, pools=pools)
    except PlanError:
        return
    shares = [process.share for process in planned.processes if process.share is not None]
    used = GATEWAY_BYTES + MODEL.weight_bytes + sum(share.kv_bytes + WORKER_RUNTIME_BYTES for share in shares)
    assert used <= machine.memory_bytes * USABLE_SHARE
    assert sum(share.threads for share in shares) <= max(len(shares), cpus)
