"""Docs that cannot rot: their tables come from the code, and the README's links and console blocks are real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_tables_of_metrics_and_settings_are_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/write_docs.py", "--check"],
        cwd=ROOT, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_setting_says_what_it_means() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert [row for row in rows if not row.strip("| ").rsplit("|", 1)[-1].strip()] == []


def test_every_environment_variable_of_baton_is_documented() -> None:
    used = {
        name
        for package in ("baton", "modelfiles", "servicekit")
        for path in (ROOT / package).rglob("*.py")
        for name in re.findall(r'"(BATON_[A-Z_]*[A-Z]|HF_HUB_OFFLINE)"', path.read_text())
    }
    page = (ROOT / "docs" / "configuration.md").read_text()
    internal = {"BATON_RUN_ID"}  # marks a run's processes for its janitor
    assert {name for name in used - internal if name not in page} == set()


def test_links_in_docs_lead_somewhere() -> None:
    broken = [
        (page.name, link)
        for page in PAGES
        for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text())
        if not (page.parent / link).exists()
    ]
    assert broken == []
