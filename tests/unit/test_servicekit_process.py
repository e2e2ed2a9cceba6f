"""Logs, health, metrics, start and end of a process."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from servicekit import lifecycle, logs
from servicekit.health import HealthState, Phase, ProgressWatch, State, health_app, is_stalled, start_http
from servicekit.metrics import ITL_BUCKETS, Metrics


@pytest.fixture
def log_lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    logs.setup("info", "json", "decode-0", stream)
    yield stream
    root.handlers[:], level = before
    root.setLevel(level)


def test_log_lines_carry_the_request_id_and_never_what_users_say(log_lines: io.StringIO) -> None:
    with logs.request_scope("req-1"):
        logging.getLogger("x").info("hello %s", "there", extra={"prompt": "my secret", "num_tokens": 3})
    line = json.loads(log_lines.getvalue())
    assert (line["message"], line["request_id"], line["num_tokens"]) == ("hello there", "req-1", 3)
    assert line["prompt"] == "<redacted>"


def test_an_exception_is_part_of_its_line(log_lines: io.StringIO) -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("x").exception("failed")
    assert "ValueError: broken" in json.loads(log_lines.getvalue())["exception"]


def test_percent_follows_phases_by_weight_and_never_goes_back() -> None:
    now = [0.0]
    health = HealthState((Phase("load_weights", 3), Phase("warmup", 1)), clock=lambda: now[0])
    assert health.percent == 0.0
    health.enter("load_weights")
    health.progress(0.5)
    health.progress(0.2)
    assert health.percent == 37.5
    now[0] = 2.0
    health.enter("warmup")
    assert (health.percent, health.phase_seconds) == (75.0, {"load_weights": 2.0})
    health.ready()
    assert (health.percent, health.state) == (100.0, State.READY)


def test_probes_tell_loading_ready_draining_stalled_and_failed_apart() -> None:
    health = HealthState((Phase("load_weights"),))
    client = TestClient(health_app(health, lambda: b"m 1\n"))

    def codes() -> tuple[int, int, int]:
        live, ready, started = (client.get(path).status_code for path in ("/livez", "/readyz", "/startupz"))
        return live, ready, started

    health.enter("load_weights")
    assert codes() == (200, 503, 503)
    assert client.get("/startupz").json()["phase"] == "load_weights"
    health.ready()
    assert codes() == (200, 200, 200)
    health.stalled = True
    assert codes() == (503, 503, 200)
    health.stalled = False
    health.drain()
    assert codes() == (200, 503, 200)
    health.fail("engine died")
    assert codes() == (503, 503, 503)
    assert client.get("/livez").json()["detail"] == "engine died"
    assert client.get("/metrics").text == "m 1\n"


def test_work_that_waits_without_a_step_is_a_stall_and_idleness_is_not() -> None:
    assert not is_stalled(idle_s=100.0, num_pending=0, predicted_step_s=0.1)
    assert is_stalled(idle_s=10.1, num_pending=1, predicted_step_s=0.1)
    assert not is_stalled(idle_s=10.1, num_pending=1, predicted_step_s=2.0)
    watch = ProgressWatch(now=0.0)
    assert not watch.observe(50.0, step_counter=7, num_pending=0, predicted_step_s=0.1)
    assert not watch.observe(59.0, step_counter=7, num_pending=1, predicted_step_s=0.1)
    assert watch.observe(60.1, step_counter=7, num_pending=1, predicted_step_s=0.1)
    assert not watch.observe(60.2, step_counter=8, num_pending=1, predicted_step_s=0.1)


async def test_the_health_port_is_served_and_its_real_number_known() -> None:
    health = HealthState()
    server = await start_http(health_app(health, lambda: b""), "127.0.0.1", 0)
    try:
        import asyncio

        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
        assert b"503" in await reader.readline()
        writer.close()
        await writer.wait_closed()
    finally:
        await server.stop()


def test_vllm_metrics_carry_vllms_two_labels() -> None:
    metrics = Metrics("m")
    metrics.vllm_gauge("num_requests_running", "running").set(2)
    metrics.vllm_counter("generation_tokens", "tokens").inc(5)
    metrics.vllm_labelled_counter("request_success", "ends", ("finished_reason",)).inc(finished_reason="stop")
    metrics.vllm_histogram("inter_token_latency_seconds", "gap", ITL_BUCKETS).observe(0.002)
    text = metrics.render().decode()
    assert 'vllm:num_requests_running{engine="0",model_name="m"} 2.0' in text
    assert 'vllm:generation_tokens_total{engine="0",model_name="m"} 5.0' in text
    assert 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 1.0' in text
    assert 'le="0.0025"' in text


def test_the_watcher_notices_that_the_parents_pipe_closed() -> None:
    read_end, write_end = os.pipe()
    gone = threading.Event()
    lifecycle.watch_parent(read_end, gone.set)
    os.write(write_end, b"x")
    os.close(write_end)
    assert gone.wait(30)
    os.close(read_end)


def test_a_secret_is_read_without_its_newline_and_an_empty_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("abc\n")
    assert lifecycle.read_secret(path) == "abc"
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        lifecycle.read_secret(path)


def test_boot_ids_differ() -> None:
    assert lifecycle.new_boot_id() != lifecycle.new_boot_id()
