"""The gateway as a process: how it starts, what it never imports, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from baton.cli import app
from gateway.fake_decode_worker import FakeDecodeWorker
from gateway.fake_model import write_fake_model
from gateway.keys import ApiKeys, cache_salt
from gateway.metrics import GatewayMetrics
from gateway.process import keep_house_once
from tests.gateway_harness import running

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True, timeout=60)


def test_help_names_the_flags_and_imports_nothing_slow() -> None:
    probe = (
        "import sys, runpy; sys.argv = ['gateway', '--help']\n"
        "try: runpy.run_module('gateway', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "slow = {'grpc', 'uvicorn', 'pydantic', 'tokenizers', 'numpy', 'torch'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = python("-c", probe)
    assert done.returncode == 0, done.stderr
    for flag in (
        "--model",
        "--http",
        "--registry-dir",
        "--workers-seed",
        "--max-queue-tokens",
        "--parent-fd",
        "--registry",
    ):
        assert flag in done.stdout


def test_the_whole_gateway_runs_without_torch_and_transformers() -> None:
    done = python("-c", "import sys, gateway.process; assert not {'torch', 'transformers'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


class _Hub:
    """Stands where the hub's client stands: one repository, and a cache of links to the files that were asked for."""

    def __init__(self, folder: Path) -> None:
        self.repository = write_fake_model(folder / "repository")
        (self.repository / "model-00001-of-00001.safetensors").write_bytes(bytes(1 << 16))
        (self.repository / "model.safetensors.index.json").write_text("{}")
        self.cache = folder / "snapshot"

    def snapshot_download(self, repo: str, *, allow_patterns: list[str], **_: Any) -> str:
        assert repo == "org/model"
        self.cache.mkdir(exist_ok=True)
        for file in self.repository.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns) and not (self.cache / file.name).exists():
                (self.cache / file.name).symlink_to(file)
        return str(self.cache)


async def test_a_gateway_runs_on_what_it_pulls_without_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is the init container's of a gateway's pod (operator/baton_operator/desired.py)."""
    hub, link = _Hub(tmp_path), tmp_path / "model"
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    done = CliRunner().invoke(app, ["pull", "org/model", "--link", str(link), "--only", "tokenizer"])
    assert done.exit_code == 0, done.output
    assert {file.name for file in link.iterdir()} == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    async with running(tmp_path, FakeDecodeWorker(), model=link) as harness:
        answer = await harness.chat(max_tokens=3)
        assert answer.status_code == 200, answer.text
    CliRunner().invoke(app, ["pull", "org/model", "--link", str(link)])
    assert "model-00001-of-00001.safetensors" in {file.name for file in link.iterdir()}, "a worker's"


class _Broken:
    """A gateway whose upkeep fails in one part."""

    def __init__(self) -> None:
        self.metrics = GatewayMetrics("model")
        self.num_refreshes = 0
        self.services = SimpleNamespace(pool=SimpleNamespace(routing_file=SimpleNamespace(refresh=self._refresh)))

    def cut_stalled_clients(self, now: float) -> None:
        raise ZeroDivisionError

    def _refresh(self) -> None:
        self.num_refreshes += 1


def test_a_bug_in_one_part_of_the_upkeep_is_logged_and_counted_and_stops_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The task ended unseen with its first exception: no client that stopped reading was ever cut again."""
    gateway = _Broken()
    for now in (1.0, 2.0):
        keep_house_once(cast(Any, gateway), now)
    assert gateway.num_refreshes == 2
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 2
    assert b"baton_gateway_housekeeping_failures_total 2.0" in gateway.metrics.render()


def test_an_unknown_flag_and_a_missing_model_are_refused() -> None:
    assert python("-m", "gateway", "--model", "x", "--no-such-flag").returncode == 2
    missing = python("-m", "gateway")
    assert missing.returncode == 2
    assert "--model is required" in missing.stderr


def test_it_starts_answers_and_ends_on_sigterm(tmp_path: Path) -> None:
    """Whoever collects its output gets one JSON line per event and nothing else."""
    model = write_fake_model(tmp_path / "model")
    flags = ["--model", str(model), "--http", "127.0.0.1:0", "--registry-dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        address = ready_line(process)["http"]
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=60) as answer:
            assert json.load(answer)["state"] == "ready"
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"http://{address}/health", timeout=60)
        process.send_signal(signal.SIGTERM)
        printed, logged = process.communicate(timeout=60)
        assert process.returncode == 0
        assert printed == ""
        assert all({"time", "level", "message"} <= json.loads(line).keys() for line in logged.splitlines())
    finally:
        process.kill()
        process.communicate()


def ready_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stderr is not None
    lines = (json.loads(line) for line in process.stderr)
    return next(line for line in lines if line["message"] == "gateway ready")


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    """What kill -9 of `baton up` leaves behind: a pipe without a writer."""
    model = write_fake_model(tmp_path / "model")
    reader, writer = os.pipe()
    flags = ["--model", str(model), "--http", "127.0.0.1:0", "--parent-fd", str(reader)]
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True, pass_fds=[reader]
    )
    try:
        ready_line(process)
        os.close(writer)
        process.wait(20)  # a drain would take longer
    finally:
        os.close(reader)
        process.kill()
        process.communicate()


def test_a_key_file_without_keys_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# nothing\n\n")
    with pytest.raises(ValueError, match="no keys"):
        ApiKeys.read(file)


def test_no_two_tenants_share_a_salt_whatever_they_send() -> None:
    salts = [cache_salt(tenant, salt) for tenant in ("", "a", "b") for salt in (None, "a", "b", "b\0a")]
    assert len(set(salts)) == len(salts)
