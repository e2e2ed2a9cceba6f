"""Workers of a test, in its own process and as processes of their own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

from tests.worker_processes import Processes
from tests.workers_harness import Workers


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncGenerator[Workers]:
    workers = Workers(tmp_path)
    yield workers
    await workers.aclose()


@pytest.fixture
def processes(tmp_path: Path, workers: Workers) -> Iterator[Processes]:
    processes = Processes(tmp_path / "registry", workers.secret_file)
    yield processes
    processes.close()
