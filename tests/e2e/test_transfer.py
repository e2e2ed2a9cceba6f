"""The ways that KV moves, through the whole product with the real SmolLM2: `transfer: nixl` and `transfer: grpc`."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from bench.service import Service, Worker, running_service
from kvtransfer import nixl_agent
from kvtransfer.liveness import SILENCE_LIMIT_S
from tests.e2e import census

pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not nixl_agent.is_available(), reason="needs the extra nixl"),
]

REQUESTS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "temperature": 0.8, "seed": 5, "n": 2},
    {"prompt": "word " * 230, "temperature": 1.0, "top_p": 0.9, "seed": 6},
    {"prompt": "The list: 1, 2, 3,", "temperature": 0, "logprobs": 3},
]
NUM_BLOCKS = 1 + 15 + 1  # of 16 tokens, without prefixes in common
_FIRST_PORT = random.randrange(20_000, 30_000)
UCX_PORTS = range(_FIRST_PORT, _FIRST_PORT + 50)  # below those that connections come from
MANY_BYTES = 32 << 10  # that a socket still has to send: blocks, not generations


def ask(service: Service, request: dict[str, Any], timeout_s: float = 120.0) -> dict[str, Any]:
    body = {"model": service.model_id, "max_tokens": 16, "return_token_ids": True, "metrics": True, **request}
    posted = urllib.request.Request(
        f"{service.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(posted, timeout=timeout_s) as reply:
        return json.load(reply)


def said(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything that is a function of the model: text, token ids, logprobs, ends."""
    return answer["choices"]


@pytest.fixture(scope="module")
def over_nixl() -> Generator[Service]:
    """UCX over TCP, as between two machines: on one host it would read the other process's memory itself.

    Small buffers: a chunk's blocks would fit into the kernel's own, and a read could end without its other end.
    """
    environ = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo", "UCX_TCP_PORT_RANGE": f"{UCX_PORTS[0]}-{UCX_PORTS[-1]}"}
    buffers = {"UCX_TCP_SNDBUF": "64k", "UCX_TCP_RCVBUF": "64k"}
    with running_service(
        disaggregation="Always",
        deterministic=True,
        kv_memory="384Mi",
        transfer="nixl",
        environ=environ | buffers,
    ) as service:
        yield service


def test_tokens_over_nixl_equal_those_over_grpc_and_those_of_one_worker_byte_for_byte(over_nixl: Service) -> None:
    before = census.total(over_nixl, "baton_transfer_bytes_total", role="decode", transport="nixl")
    answers = [ask(over_nixl, request) for request in REQUESTS]
    block_bytes = 16 * 2 * 30 * 3 * 64 * 4  # SmolLM2-135M, float32
    moved = census.total(over_nixl, "baton_transfer_bytes_total", role="decode", transport="nixl") - before
    assert moved >= NUM_BLOCKS * block_bytes, "the blocks did not go by nixl"
    assert {answer["metrics"]["transport"] for answer in answers} == {"nixl"}
    for way in ("grpc", "shm", ""):
        assert census.total(over_nixl, "baton_transfers_total", role="decode", transport=way) == 0
    assert census.total(over_nixl, "baton_transport_pairs", role="decode", transport="nixl") == 1
    census.eventually("`baton ps` shows the way", lambda: _ways_of(over_nixl) == ["nixl"])
    assert "nixl" in over_nixl.baton("ps")
    for service in (
        {"disaggregation": "Always", "transfer": "grpc"},
        {
            "disaggregation": "Never",
            "prefill": 0,
            "engine": {"maxBatchedTokens": 72, "maxNumSeqs": 8, "prefixCaching": False},
        },
    ):
        with running_service(deterministic=True, kv_memory="384Mi", **service) as other:
            assert [said(ask(other, request)) for request in REQUESTS] == [said(answer) for answer in answers], service
            assert _ways_of(other) in (["grpc"], [])


def _ways_of(service: Service) -> list[str]:
    (decode,) = (row for row in json.loads(service.baton("ps", "--json"))["processes"] if row["role"] == "decode")
    return decode["transports"]


def _is_settled(service: Service) -> bool:
    try:
        return all(census.scrape(worker).is_at_rest for worker in service.workers() if worker.role != "gateway")
    except OSError:
        return False


def _bytes_to_send(pid: int) -> int:
    """Most that a UCX connection of the process has not been rid of yet."""
    held = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    most = 0
    with open("/proc/net/tcp") as table:
        for words in (line.split() for line in table.readlines()[1:]):
            ports = {int(end.rpartition(":")[2], 16) for end in words[1:3]}
            if ports & set(UCX_PORTS) and f"socket:[{words[9]}]" in held:
                most = max(most, int(words[4].partition(":")[0], 16))
    return most


def _reads_torn_down(service: Service) -> int:
    (decode,) = service.workers("decode")
    return service.log(decode.worker_id).count("a one-sided read does not end")


def _stop_in_mid_read(service: Service, prefill: Worker) -> None:
    """As soon as blocks are on their way. Looks every millisecond or so: they take tens of them."""
    deadline = time.monotonic() + 60.0
    while _bytes_to_send(prefill.pid) < MANY_BYTES:
        assert time.monotonic() < deadline, "no blocks were read"
    os.kill(prefill.pid, signal.SIGSTOP)


def test_a_prefill_worker_frozen_in_the_middle_of_a_read_is_fenced_and_serves_again(over_nixl: Service) -> None:
    """Past its lease. The prompt is prefilled elsewhere, and what lands late lands in nobody's blocks.

    That a read was under way is what D says when it tears it down; where it had just ended, the freeze is played again.
    """
    request = {"prompt": "frozen " * 400, "temperature": 0.7, "seed": 8}
    expected = said(ask(over_nixl, request))
    for number in range(5):
        (prefill,) = over_nixl.workers("prefill")
        before = _reads_torn_down(over_nixl)
        frozen = request | {"cache_salt": f"frozen-{number}"}
        answers: list[dict[str, Any]] = []
        asking = threading.Thread(target=lambda asked=frozen, into=answers: into.append(ask(over_nixl, asked)))
        asking.start()
        _stop_in_mid_read(over_nixl, prefill)
        stopped_at = time.monotonic()
        try:
            asking.join(120.0)
            assert said(answers[0]) == expected
            time.sleep(max(0.0, SILENCE_LIMIT_S + 1.0 - (time.monotonic() - stopped_at)))
        finally:
            os.kill(prefill.pid, signal.SIGCONT)
        # UCX may abort a process that continues under a read whose peer is gone; its supervisor starts it again.
        census.eventually("the prefill worker is fenced, or started again", lambda: _is_settled(over_nixl), 60.0)
        assert said(ask(over_nixl, frozen)) == expected, "the blocks that D cached meanwhile were overwritten"
        if _reads_torn_down(over_nixl) > before:
            break
    else:
        raise AssertionError("no read was in flight in five freezes")
    before = census.total(over_nixl, "baton_transfers_total", role="decode", transport="nixl", outcome="committed")

    def goes_by_nixl_again() -> bool:
        assert said(ask(over_nixl, request | {"cache_salt": f"later-{time.monotonic()}"})) == expected
        return census.total(over_nixl, "baton_transfers_total", role="decode", transport="nixl") > before

    census.eventually("KV comes by nixl again", goes_by_nixl_again, 60.0)
    assert census.total(over_nixl, "baton_verification_failures_total", role="decode") == 0
    census.at_rest(over_nixl)
