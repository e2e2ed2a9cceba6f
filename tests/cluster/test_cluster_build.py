"""Building the test cluster's programs: once, whole or not at all, and with a reason where it cannot be."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster import build
from tests.cluster.build import Tier, Tool
from tests.cluster.errors import BuildFailed, Unavailable

pytestmark = pytest.mark.skipif(
    not (shutil.which("go") or Path("/usr/local/go/bin/go").exists()), reason="Go is not installed"
)
SOURCE = "package main\n\nfunc main() {}\n"


@pytest.fixture(autouse=True)
def go_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tier of one tiny program, and a cache of its own."""
    folder = tmp_path / "go" / "tiny"
    folder.mkdir(parents=True)
    (folder / "go.mod").write_text("module tiny\n\ngo 1.25.0\n")
    (folder / "main.go").write_text(SOURCE)
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setattr(build, "GO_FOLDER", tmp_path / "go")
    monkeypatch.setattr(build, "TOOLS", {"tiny": Tool("tiny", "tiny", ".", 1)})
    monkeypatch.setattr(build, "TIERS", {"tiny": Tier(("tiny",), ())})
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path / "cache")
    return folder


def test_two_runs_that_start_together_build_once() -> None:
    said: list[str] = []
    with ThreadPoolExecutor(2) as both:
        list(both.map(lambda _: build.ensure_tier("tiny", said.append), range(2)))
    assert len([line for line in said if line.startswith("built tiny")]) == 1
    assert build.find("tiny")["tiny"].is_file()


def test_a_changed_source_is_another_program(go_folder: Path) -> None:
    build.ensure_tier("tiny", print)
    before = build.find("tiny")
    (go_folder / "main.go").write_text(SOURCE + "// changed\n")
    with pytest.raises(Unavailable, match=r"not built: tiny \(run `make cluster-tools`\)"):
        build.find("tiny")
    build.ensure_tier("tiny", print)
    assert build.find("tiny") != before


def test_what_does_not_compile_leaves_nothing_and_says_why(go_folder: Path, tmp_path: Path) -> None:
    (go_folder / "main.go").write_text("package main\n\nfunc main() { undefined() }\n")
    with pytest.raises(BuildFailed, match=r"tiny could not be built:(.|\n)*undefined: undefined"):
        build.ensure_tier("tiny", print)
    assert [path for path in (tmp_path / "cache").rglob("*tiny*") if path.is_file()] == []


def test_a_program_of_kubebuilder_assets_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").touch()
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    assert build.find("tiny") == {"tiny": tmp_path / "tiny"}


def test_without_go_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_names, **_options: None)
    with pytest.raises(Unavailable, match="Go is needed to build tiny"):
        build.ensure_tier("tiny", print)
