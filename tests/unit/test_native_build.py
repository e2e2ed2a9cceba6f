"""The kernel library is compiled once per source, flags and compiler, and is never half there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine.kernels.native import build as module
from engine.kernels.native.build import Isa, KernelsUnavailable, build, detect_isa, ship

FAKE = """#!/bin/sh
case "$1" in --version) echo "fake {version}"; exit 0;; esac
echo compiled >> {log}
for last; do :; done
{action}
"""


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes a file and counts its runs."""
    path = tmp_path / "fake-c++"
    write_fake(path, "1", 'echo library > "$last"')
    monkeypatch.setenv("CXX", str(path))
    return path


def write_fake(path: Path, version: str, action: str) -> None:
    path.write_text(FAKE.format(version=version, log=path.parent / "log", action=action))
    path.chmod(0o755)


def runs(path: Path) -> int:
    log = path.parent / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir(exist_ok=True)
    return folder


def test_a_second_build_comes_from_the_cache(fake_compiler: Path, tmp_path: Path) -> None:
    first, second = build(cache=cache(tmp_path)), build(cache=cache(tmp_path))
    assert first == second
    assert first.path.read_text() == "library\n"
    assert runs(fake_compiler) == 1


def test_another_isa_or_compiler_version_is_another_library(fake_compiler: Path, tmp_path: Path) -> None:
    first = build(cache=cache(tmp_path))
    other_isa = build(Isa("other", ("-mother",)), cache=cache(tmp_path))
    write_fake(fake_compiler, "2", 'echo library > "$last"')
    other_compiler = build(cache=cache(tmp_path))
    assert len({first.key, other_isa.key, other_compiler.key}) == 3


def test_a_changed_source_is_another_library(
    fake_compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(cache=cache(tmp_path))
    changed = shutil.copytree(module.SOURCES, tmp_path / "changed")
    (changed / "gemm.hpp").write_text((changed / "gemm.hpp").read_text() + "// another\n")
    monkeypatch.setattr(module, "SOURCES", changed)
    assert build(cache=cache(tmp_path)).key != first.key


def test_a_failing_compiler_leaves_nothing_under_the_final_name(fake_compiler: Path, tmp_path: Path) -> None:
    write_fake(fake_compiler, "1", 'echo half > "$last"; echo "error: no such flag" >&2; exit 1')
    with pytest.raises(KernelsUnavailable, match="no such flag"):
        build(cache=cache(tmp_path))
    assert [path.suffix for path in cache(tmp_path).iterdir()] == [".lock"]


def test_no_compiler_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler-here")
    with pytest.raises(KernelsUnavailable, match="no-such-compiler-here"):
        build(cache=cache(tmp_path))


def test_an_unwritable_cache_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_compiler: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(KernelsUnavailable, match="XDG_CACHE_HOME"):
        build()


def test_the_isa_of_this_machine_is_known() -> None:
    assert detect_isa().name


@pytest.fixture
def own_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources to ship beside, as in an image that is being built."""
    copy = shutil.copytree(module.SOURCES, tmp_path / "sources")
    monkeypatch.setattr(module, "SOURCES", copy)
    return copy


def test_a_shipped_library_needs_no_compiler_and_no_cache(
    fake_compiler: Path, own_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = ship()
    monkeypatch.setenv("CXX", "no-such-compiler-here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing-may-appear-here"))
    for library in shipped:
        assert build(library.isa) == library
    assert detect_isa() in [library.isa for library in shipped], "every machine finds its own"
    assert not (tmp_path / "nothing-may-appear-here").exists()


def test_a_shipped_library_of_other_sources_is_not_used(fake_compiler: Path, own_sources: Path, tmp_path: Path) -> None:
    shipped = {library.path for library in ship()}
    (own_sources / "gemm.hpp").write_text("// another\n")
    assert build(cache=cache(tmp_path)).path not in shipped


def test_a_library_is_called_the_same_shipped_or_made_at_first_use(
    fake_compiler: Path, own_sources: Path, tmp_path: Path
) -> None:
    made = build(cache=cache(tmp_path))
    assert made.key in [library.key for library in ship()], "the key enters the numerics fingerprint"
