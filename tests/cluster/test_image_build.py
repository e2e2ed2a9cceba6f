"""`images/build.py` with the real buildah: what it keeps of former builds."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from images import build as image_build
from images.build import Builder
from tests.cluster.build import find_tier
from tests.cluster.errors import Unavailable

DOCKERFILE = """
FROM scratch AS parts
COPY same /same
COPY other /other
FROM scratch AS worker
COPY --from=parts /other /other
COPY last /last
"""
NAME = "localhost/baton-worker:dev"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose image is made of three files."""
    try:
        find_tier("images")
    except Unavailable as reason:
        pytest.skip(f"images: {reason}")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "Dockerfile").write_text(DOCKERFILE)
    (tmp_path / "images" / "Dockerfile.dockerignore").write_text("storage\n")
    for name in ("same", "other", "last"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(image_build, "ROOT", tmp_path)
    return tmp_path


def build(root: Path, max_bytes: int) -> Builder:
    builder = Builder("buildah", root / "storage", None)
    with builder.at_work() as is_alone:
        builder.build("worker", NAME, None)
        assert is_alone()
        builder.remove_unused(max_bytes)
    return builder


def num_layers(root: Path) -> int:
    command = ["buildah", "--root", root / "storage" / "root", "--runroot", root / "storage" / "run", "images", "-aq"]
    return len(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.timeout(900)
def test_layers_of_former_builds_go_when_there_are_too_many_bytes_and_those_of_this_one_stay(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build(root, 1 << 40)
    once = num_layers(root)
    (root / "other").write_text("changed")
    build(root, 1 << 40)
    assert num_layers(root) > once, "nothing is removed while there is room"
    build(root, 0)
    assert num_layers(root) == once
    assert f"images with names: {NAME}" in capfd.readouterr().out
    build(root, 0)
    said = capfd.readouterr()
    assert said.err.count("Using cache") == said.err.count(": COPY "), said.err


def test_nothing_is_removed_while_another_build_is_at_work(root: Path) -> None:
    builder = Builder("buildah", root / "storage", None)
    with Builder("buildah", root / "storage", None).at_work() as other_is_alone:
        assert other_is_alone()
    with builder.at_work() as is_alone, Builder("buildah", root / "storage", None).at_work():
        assert not is_alone()
