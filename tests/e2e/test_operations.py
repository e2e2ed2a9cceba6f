"""A service as its operator sees it: documented metrics, logs without secrets. Real processes, a tiny random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from bench.ports import free_port
from tests.metrics_text import Metrics, documented, types_of

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
API_KEY = "canary-api-key-5150"
WRONG_KEY = "canary-wrong-key-8866"
PROMPT = "canary-prompt-7319 tells about a river that flows past many towns and hills"
QUEUES = (
    "baton_prefill_queue_requests", "baton_prefill_held_requests",
    "baton_decode_promised_requests", "baton_decode_filling_requests",
)  # fmt: skip


@dataclass
class Operated:
    """A running service with API keys, and what was said to it."""

    folder: Path
    port: int
    environ: dict[str, str]
    answers: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    errors: list[str] = field(default_factory=list[str])
    at_start: dict[str, str] = field(default_factory=dict[str, str])  # `baton up` itself asks for a first token

    def baton(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "baton", *arguments],
            cwd=ROOT, env=self.environ, text=True, capture_output=True, timeout=500, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def post(self, path: str, body: dict[str, Any], key: str = API_KEY) -> dict[str, Any] | None:
        """The answer; None where it was refused (the error's text is kept)."""
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                answer: dict[str, Any] = json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                self.errors.append(error.read().decode())
            return None
        self.answers.append(answer)
        return answer

    def processes(self) -> dict[str, dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.baton("ps", "--json"))["processes"]
        return {row["role"]: row for row in rows}

    def metrics(self) -> dict[str, str]:
        """The text of /metrics by role, once all are at rest: workers hear of an answer's end later than its client."""
        deadline = time.monotonic() + 60.0
        while True:
            found = self._scraped()
            if all(Metrics.parse(text).is_at_rest for text in found.values()):
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.1)

    def _scraped(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for role, row in self.processes().items():
            with urllib.request.urlopen(f"http://{row['http']}/metrics", timeout=60) as reply:
                found[role] = reply.read().decode()
        return found


@pytest.fixture(scope="module")
def operated(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Operated]:
    """One worker of each kind, every prompt handed over, debug logs; with known traffic behind it."""
    folder = tmp_path_factory.mktemp("operated")
    (folder / "keys").write_text(API_KEY + "\n")
    port = free_port()
    spec = {
        "model": {"source": str(tiny_llama), "name": "tiny"},
        "pools": {name: {"replicas": 1, "threads": 1, "kvMemory": "32Mi"} for name in ("prefill", "decode")},
        "disaggregation": "Always",
        "gateway": {"port": port, "apiKeysFile": str(folder / "keys")},
    }
    head = {"apiVersion": "serving.baton.dev/v1alpha1", "kind": "LLMService", "metadata": {"name": "ops"}}
    (folder / "service.yaml").write_text(yaml.safe_dump(head | {"spec": spec}))
    environ = os.environ | {"BATON_RUN_DIR": str(folder / "run"), "BATON_LOG_LEVEL": "debug"}
    service = Operated(folder, port, environ)
    try:
        service.baton("up", "--detach", "--file", str(folder / "service.yaml"))
        service.at_start = service.metrics()
        _talk(service)
        yield service
    finally:
        service.baton("down")


def _talk(service: Operated) -> None:
    """Four answers of 8 tokens, and every way of being refused."""
    ask = {"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
    for body in (ask, ask | {"seed": 1, "n": 2}, ask | {"logprobs": 2, "user": "canary-user"}):
        assert service.post("/v1/completions", body) is not None
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, "ignore_eos": True}
    service.post("/v1/chat/completions", chat)
    assert service.post("/v1/completions", ask, WRONG_KEY) is None
    assert service.post("/v1/completions", ask | {"stop": 5}) is None
    assert service.post("/v1/completions", ask | {"model": "other"}) is None
    assert service.post(f"/v1/{PROMPT.split()[0]}", ask) is None


def test_metrics_of_all_three_processes_are_the_documented_ones(operated: Operated) -> None:
    live: dict[tuple[str, str], str] = {}
    for role, text in operated.metrics().items():
        live |= {(role, name): kind for name, kind in types_of(role, text).items()}
    assert live == {key: kind for key, (kind, _) in documented().items() if key[0] != "operator"}  # not in local mode


def value(text: str, name: str, **labels: str) -> float:
    """Sum of a metric's samples that carry these labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_metrics_count_the_known_traffic(operated: Operated) -> None:
    metrics = operated.metrics()
    num_chat = sum(answer["object"] == "chat.completion" for answer in operated.answers)
    usage = [answer["usage"] for answer in operated.answers]
    gateway, prefill, decode = (metrics[role] for role in ("gateway", "prefill", "decode"))

    def grown(name: str, **labels: str) -> float:
        return value(gateway, name, **labels) - value(operated.at_start["gateway"], name, **labels)

    assert grown("vllm:generation_tokens_total") == sum(each["completion_tokens"] for each in usage)
    assert grown("vllm:prompt_tokens_total") == sum(each["prompt_tokens"] for each in usage)
    assert grown("vllm:request_success_total", finished_reason="length") == 4 + num_chat
    assert grown("vllm:e2e_request_latency_seconds_count") == len(usage)
    assert grown("vllm:time_to_first_token_seconds_count") == len(usage)
    assert 0 < value(gateway, "vllm:time_to_first_token_seconds_sum") < 60
    assert value(gateway, "baton_gateway_http_responses_total", status="401") == 1
    remote = value(decode, "baton_placements_total", path="remote")
    assert remote >= 1
    assert value(decode, "baton_transfers_total", outcome="committed") == remote
    assert value(decode, "baton_transfer_bytes_total") > 0
    assert value(decode, "baton_verification_failures_total") == 0
    assert value(prefill, "vllm:request_success_total") == remote
    for text in (prefill, decode):
        assert 0 <= value(text, "vllm:kv_cache_usage_perc") <= 1
        assert value(text, "vllm:num_requests_running") == value(text, "vllm:num_requests_waiting") == 0
        assert value(text, "baton_kv_blocks", state="reserved") == 0
    assert [value(prefill + decode, name) for name in QUEUES] == [0, 0, 0, 0]
    assert all(f"# TYPE {name} gauge" in prefill + decode for name in QUEUES)


def test_clients_cannot_make_new_series(operated: Operated) -> None:
    def num_series() -> dict[str, int]:
        return {role: sum(line[0] != "#" for line in text.splitlines()) for role, text in operated.metrics().items()}

    body = {"prompt": "x", "max_tokens": 1, "prompt_template": "x"}
    operated.post("/v1/nothing", body)
    before = num_series()
    for number in range(20):
        operated.post(f"/v1/path-{number}", body)
        operated.post("/v1/completions", body | {"user": f"u{number}", "model": f"m{number}"})
        operated.post("/v1/completions", body | {"cache_salt": f"s{number}"}, key=f"key-{number}")
    assert num_series() == before


def test_logs_metrics_errors_and_commands_hold_nothing_secret(operated: Operated) -> None:
    run = operated.folder / "run" / "ops"
    logs = "".join(path.read_text(errors="replace") for path in (run / "logs").glob("*.log"))
    assert "DEBUG" in logs
    assert "request ended" in logs
    registry = "".join(path.read_text() for path in (run / "registry").iterdir())
    commands = "".join(
        Path(f"/proc/{row['pid']}/cmdline").read_text() for row in operated.processes().values() if row["pid"]
    )
    seen = logs + registry + commands + "".join(operated.metrics().values()) + operated.baton("ps", "--json")
    secret = (run / "secret").read_text().strip()
    for canary in (API_KEY, WRONG_KEY, secret, PROMPT, PROMPT.split()[0], "canary-user"):
        assert canary not in seen, canary
        if canary not in (PROMPT, PROMPT.split()[0]):  # an error may show a client its own values
            assert canary not in "".join(operated.errors), canary
    for answer in operated.answers:
        for choice in answer["choices"]:
            text = choice.get("text") or choice["message"]["content"]
            assert len(text) < 4 or text not in seen
            for ids in (choice.get("token_ids"), choice.get("prompt_token_ids")):
                assert not ids or str(ids[:6])[1:-1] not in seen


def test_files_of_the_run_are_for_their_owner_alone(operated: Operated) -> None:
    run = operated.folder / "run" / "ops"
    for path in (run, run / "secret", run / "control", run / "registry", run / "logs", *(run / "logs").iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path
