"""Worker processes for tests: started, asked about themselves, and none left."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from kvtransfer.protocol import baton_pb2 as pb
from tests.metrics_text import Metrics
from tests.workers_harness import PATIENCE_S, until

ROOT = Path(__file__).parents[1]
FAKE = ("--model", ".")


@dataclass
class Process:
    """A worker process and what it wrote about itself."""

    popen: subprocess.Popen[bytes]
    registry_file: Path

    @property
    def entry(self) -> dict[str, str]:
        return json.loads(self.registry_file.read_bytes())

    @property
    def address(self) -> str:
        return self.entry["address"]

    @property
    def candidate(self) -> pb.PrefillCandidate:
        boot_id = bytes.fromhex(self.entry["boot_id"])
        return pb.PrefillCandidate(worker_id=self.entry["worker_id"], address=self.entry["address"], boot_id=boot_id)

    async def ended(self) -> int:
        await until(lambda: self.popen.poll() is not None)
        return self.popen.returncode

    def metrics(self) -> Metrics:
        with urllib.request.urlopen(f"http://{self.entry['http']}/metrics", timeout=20) as answer:
            return Metrics.parse(answer.read().decode())

    async def at_baseline(self) -> None:
        """Wait until every block is free or cached and no ticket is held."""
        async with asyncio.timeout(PATIENCE_S):
            while not (await asyncio.to_thread(self.metrics)).is_at_rest:
                await asyncio.sleep(0.05)

    def probe(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://{self.entry['http']}{path}", timeout=PATIENCE_S) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


class Processes:
    """Starts processes and leaves none."""

    def __init__(self, folder: Path, secret_file: Path) -> None:
        self._folder = folder
        self._secret_file = secret_file
        self._started: list[subprocess.Popen[bytes]] = []

    async def start(self, *command: str, flags: tuple[str, ...] = (), pass_fds: tuple[int, ...] = ()) -> Process:
        """`command` is what follows `python -m`; returns once the worker has announced itself."""
        worker_id = f"process{len(self._started)}"
        common = [
            "--worker-id",
            worker_id,
            "--secret-file",
            str(self._secret_file),
            "--registry-dir",
            str(self._folder),
        ]
        popen = subprocess.Popen(  # noqa: ASYNC220  forking takes milliseconds
            [sys.executable, "-m", *command, *common, *flags],
            cwd=ROOT,
            env=os.environ | {"BATON_ALLOW_FAILPOINTS": "1"},
            pass_fds=pass_fds,
        )
        self._started.append(popen)
        process = Process(popen, self._folder / f"{worker_id}.json")
        await until(lambda: process.registry_file.exists() or popen.poll() is not None)
        assert popen.poll() is None, f"{command} ended with {popen.returncode}"
        return process

    def close(self) -> None:
        for popen in self._started:
            popen.kill()
            popen.wait(PATIENCE_S)
