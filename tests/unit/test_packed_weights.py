"""The host's file of packed weights: made once, whole or not at all, checked, and equal to packing privately."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.kernels.native.build import build, supported_isas
from engine.kernels.native.library import Library, load_library
from engine.loading import layout as layout_module
from engine.loading import packed_file
from engine.loading.layout import PackedLayout, PanelFormat, PartKind
from engine.loading.region import PackedRegion, open_region
from modelfiles.cache import temporary_path
from modelfiles.read_config import load_config
from modelfiles.weights import open_weights

DIGEST = "d" * 64
ROOT = Path(__file__).resolve().parents[2]

# What another process runs: open the region, say so, and wait for the end of its input.
OPEN = """
import sys, hashlib
from pathlib import Path
from engine.kernels.native.library import load_library
from engine.loading.region import open_region
from modelfiles.read_config import load_config
from modelfiles.weights import open_weights
import engine.loading.packed_file as packed_file

model, cache, slow = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "slow"
made = []

def on_fraction(fraction):
    made.append(fraction)
    if slow:
        print("writing", flush=True)
        sys.stdin.read()

region = open_region(
    load_config(model), open_weights(model), load_library(), "float32",
    cache=cache, model_digest="d" * 64, min_shared_bytes=0, on_fraction=on_fraction,
)
print("shared" if region.shared else "private", hashlib.sha256(region.memory.numpy()).hexdigest(), flush=True)
"""


def opened(
    model: Path, cache: Path | None, dtype: str = "float32", library: Library | None = None, min_bytes: int = 0
) -> PackedRegion:
    return open_region(
        load_config(model),
        open_weights(model),
        library or load_library(),
        dtype,
        cache=cache,
        model_digest=DIGEST,
        min_shared_bytes=min_bytes,
    )


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.weights"))


def start(model: Path, cache: Path, pace: str = "fast") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OPEN, str(model), str(cache), pace],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("piece_bytes", [1, 4096, 4 * 1024**2], ids=lambda size: f"pieces-of-{size}")
def test_the_shared_file_has_the_bits_of_private_packing(
    tiny_llama: Path, tmp_path: Path, dtype: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = opened(tiny_llama, None, dtype)
    monkeypatch.setattr(layout_module, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(packed_file, "_HUGE_PAGE", 8192)  # so that the file grows many times while it is written
    made, again = opened(tiny_llama, tmp_path, dtype), opened(tiny_llama, tmp_path, dtype)
    assert (private.shared, made.shared, again.shared) == (False, True, True)
    assert torch.equal(made.memory, private.memory)
    assert torch.equal(again.memory, private.memory)


def test_packed_values_are_those_of_the_checkpoint(tiny_qwen3: Path) -> None:
    """Read back from the panels in plain Python, against a layout that is wrong on both sides."""
    region, weights = opened(tiny_qwen3, None), open_weights(tiny_qwen3)
    panel, width = region.layout.format.panel, region.layout.format.vector_width
    for part in region.layout.parts.values():
        values = region.memory[part.offset : part.offset + part.num_bytes].view(torch.float32)
        sources = [torch.from_numpy(weights[name].float32()) for name, _ in part.sources]
        if part.kind is PartKind.VECTOR:
            assert torch.equal(values, torch.cat(sources))
        elif part.kind is PartKind.MATRIX:
            rows = values.view(-1, part.k, panel).transpose(1, 2).reshape(-1, part.k)
            assert torch.equal(rows[: part.n], torch.cat(sources))
            assert not rows[part.n :].any()
        else:
            rows = values.view(-1, part.k, 2, width).permute(2, 0, 3, 1).reshape(2, -1, part.k)
            assert torch.equal(rows[:, : part.n], torch.stack(sources))


def test_a_later_start_uses_the_file(tiny_llama: Path, tmp_path: Path) -> None:
    opened(tiny_llama, tmp_path)
    before = files(tmp_path)[0].stat()
    opened(tiny_llama, tmp_path)
    after = files(tmp_path)[0].stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_shared_weights_cannot_be_written(tiny_llama: Path, tmp_path: Path) -> None:
    """A stray write must not change what other workers compute: it ends the process."""
    code = OPEN + "region.memory[0] = 1\nprint('written', flush=True)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_llama), str(tmp_path), "fast"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == -signal.SIGSEGV
    assert done.stdout.startswith("shared")
    assert "written" not in done.stdout


def test_every_type_and_instruction_set_has_its_own_file(tiny_llama: Path, tmp_path: Path) -> None:
    widths = set[tuple[int, int]]()
    for isa in supported_isas():
        library = Library(build(isa))
        widths.add((library.vector_width, library.panel))
        for dtype in ("float32", "bfloat16"):
            shared = opened(tiny_llama, tmp_path, dtype, library)
            assert torch.equal(shared.memory, opened(tiny_llama, None, dtype, library).memory)
    assert len(files(tmp_path)) == 2 * len(widths)


def test_another_version_replaces_the_file(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tiny_llama, tmp_path)
    opened(tiny_llama, tmp_path, "bfloat16")
    old = files(tmp_path)
    monkeypatch.setattr(packed_file, "VERSION", packed_file.VERSION + 1)
    opened(tiny_llama, tmp_path)
    kept = [path for path in old if path in files(tmp_path)]
    assert [path.name for path in kept] == [path.name for path in old if "bfloat16" in path.name]
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["header", "first byte", "last byte", "cut", "longer", "empty", "other"])
def test_a_damaged_file_is_found_and_made_again(tiny_llama: Path, tmp_path: Path, damage: str) -> None:
    good = opened(tiny_llama, tmp_path).memory.clone()
    path = files(tmp_path)[0]
    content = bytearray(path.read_bytes())
    start = len(content) - good.numel()
    for name, position in (("header", 30), ("first byte", start), ("last byte", -1)):
        if damage == name:
            content[position] ^= 1
    changed = {"cut": content[:-4096], "longer": content + b"x", "empty": b"", "other": b"o" * len(content)}
    path.write_bytes(changed.get(damage, content))
    again = opened(tiny_llama, tmp_path)
    assert again.shared
    assert torch.equal(again.memory, good)
    assert len(files(tmp_path)) == 1


def test_two_processes_at_once_make_the_file_once_and_read_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    both = [start(tiny_llama, tmp_path), start(tiny_llama, tmp_path)]
    said = [process.communicate(timeout=120)[0].split() for process in both]
    assert said[0] == said[1]
    assert said[0][0] == "shared"
    assert len(files(tmp_path)) == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_writer_killed_half_way_leaves_nothing_under_the_final_name(tiny_llama: Path, tmp_path: Path) -> None:
    writer = start(tiny_llama, tmp_path, "slow")
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate(timeout=30)
    assert not files(tmp_path)
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    again = opened(tiny_llama, tmp_path)
    assert again.shared
    assert torch.equal(again.memory, opened(tiny_llama, None).memory)
    assert not list(tmp_path.glob(".*.tmp"))


def test_whoever_waits_for_the_file_sees_how_far_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    layout = PackedLayout.of(load_config(tiny_llama), PanelFormat(16, 32, "float32"))
    file = packed_file.PackedFile(tmp_path, DIGEST, layout)
    assert file.fraction_of_another() == 0.0
    temporary_path(file.path).write_bytes(b"x" * (layout.num_bytes // 2))
    assert 0.4 < file.fraction_of_another() < 0.7


def test_without_a_writable_cache_weights_are_private_and_the_log_says_so(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    region = opened(tiny_llama, tmp_path / "cache")
    assert not region.shared
    assert torch.equal(region.memory, opened(tiny_llama, None).memory)
    assert "this process's own memory" in caplog.text


def test_a_model_too_small_to_matter_makes_no_file(tiny_llama: Path, tmp_path: Path) -> None:
    assert not opened(tiny_llama, tmp_path, min_bytes=1024**3).shared
    assert not list(tmp_path.iterdir())


def test_progress_is_told_up_to_the_end(tiny_llama: Path, tmp_path: Path) -> None:
    fractions: list[float] = []
    open_region(
        load_config(tiny_llama),
        open_weights(tiny_llama),
        load_library(),
        "float32",
        cache=tmp_path,
        model_digest=DIGEST,
        min_shared_bytes=0,
        on_fraction=fractions.append,
    )
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] <= fractions[-1] <= 1.0
    assert fractions[-1] > 0.5
