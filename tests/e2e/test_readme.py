"""Every command in a console block of README.md and docs/*.md is run, in order, in a fresh copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.ports import free_port

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SKIPPED = {
    "make test": "it is what runs this test",
    "make bench": "hours; its parts have tests of their own",
    "make soak": "hours",
}


def commands() -> list[tuple[str, str]]:
    """(page, command without its comment) of every console block; continued lines joined."""
    found: list[tuple[str, str]] = []
    for page in PAGES:
        for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("$ "):
                    found.append((page.name, re.sub(r"\s{2,}# .*", "", line[2:]).strip()))
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git knows, without what was built beside them."""
    folder = tmp_path_factory.mktemp("clone") / "baton"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def adapted(command: str, port: int) -> str:
    """The same command with this interpreter instead of .venv, detached where it would stay, on a free port."""
    baton = f"{sys.executable} -m baton"
    command = command.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace(".venv/bin/baton", baton)
    if re.fullmatch(r"make up( ARGS=.*)?", command):  # what the Makefile's target runs once .venv is there
        command = f"{baton} up --detach --port {port}"
    if command.endswith("baton doctor"):
        command += f" --port {free_port()}"  # the service that is up has the port
    return command.replace("curl ", "curl --silent --show-error --fail --max-time 120 ")


def test_every_answer_that_a_page_asks_for_is_bounded() -> None:
    """Whether and when a model stops by itself depends on the processor: its kernels round differently."""
    asks = [(page, command) for page, command in commands() if "completions" in command]
    assert asks
    for page, command in asks:
        assert '"max_tokens": ' in command, f"{page}: {command}"


def test_console_blocks_run_in_a_fresh_copy(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    environ = os.environ | {
        "BATON_RUN_DIR": str(copy.parent / "run"),
        "PYTHONPATH": os.pathsep.join([str(copy), str(copy / "operator")]),
    }
    given = commands()
    assert {"make up", ".venv/bin/baton down"} <= {command for _, command in given}
    try:
        for page, command in given:
            if command in SKIPPED:
                with capsys.disabled():
                    print(f"\nskipped: {page}: {command}: {SKIPPED[command]}")
                continue
            done = subprocess.run(
                adapted(command, port), shell=True, cwd=copy, env=environ, capture_output=True, text=True,
                timeout=300, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{page}: {command}\n{done.stdout}\n{done.stderr}"
            assert done.stdout.strip(), f"{page}: {command} printed nothing"
            if "curl" in command:
                assert "data: [DONE]" in done.stdout
    finally:
        down = [sys.executable, "-m", "baton", "down"]
        subprocess.run(down, cwd=copy, env=environ, capture_output=True, timeout=120, check=False)


def test_the_makefile_runs_what_the_test_runs_in_its_place() -> None:
    """`make up` is adapted above: this keeps the adaption honest."""
    printed = subprocess.run(
        ["make", "--dry-run", "up", "ARGS=--detach"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    ).stdout
    assert ".venv/bin/python -m baton up --detach" in printed
