"""Compile the C++ kernels once per machine and keep the library in a cache.

    instruction set - sources and flags - compiler = key -> <cache>/baton/kernels/<key>.so

Done at first use (seconds) or before, by `python -m engine.kernels.native.build`. Workers that start together wait for
one of them; a library appears under its name only when it is complete. A container image brings the libraries of every
instruction set in `shipped/` (`--ship`) and needs no compiler; they are used only while the sources are those.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-DNDEBUG")
_X86_MACHINES = ("x86_64", "amd64")
_X86_LEVELS = (
    (
        "avx512",
        ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "f16c", "bmi1", "bmi2"),
        (
            *("-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"),
            *("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"),
        ),
    ),
    ("avx2", ("avx2", "fma", "f16c", "bmi1", "bmi2"), ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")),
)


class KernelsUnavailable(Exception):
    """The native kernels cannot be built here: no compiler, or it failed. The message says what was tried."""


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set that the kernels are compiled for."""

    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NativeBuild:
    """A compiled library and what names it: `key` is made of instruction set, sources, flags and compiler."""

    path: Path
    isa: Isa
    key: str


def detect_isa() -> Isa:
    """The widest instruction set that this machine has and the kernels know."""
    machine = platform.machine().lower()
    if machine in _X86_MACHINES:
        present = _cpu_flags()
        for name, needed, flags in _X86_LEVELS:
            if present.issuperset(needed):
                return Isa(name, flags)
    return Isa(machine, ())


def supported_isas() -> tuple[Isa, ...]:
    """Every instruction set that this machine can run, widest first; tests compare them."""
    best = detect_isa()
    names = [name for name, _, _ in _X86_LEVELS]
    if best.name not in names:
        return (best,)
    wider = _X86_LEVELS[names.index(best.name) :]
    return (*(Isa(name, flags) for name, _, flags in wider), Isa(platform.machine().lower(), ()))


def build(isa: Isa | None = None, cache: Path | None = None) -> NativeBuild:
    """Find the library among those that were shipped, then in the cache, or compile it.

    Raises: KernelsUnavailable.
    """
    isa = isa or detect_isa()
    return _find_shipped(isa) or _build_in(cache or _cache_folder(), isa)


def ship() -> tuple[NativeBuild, ...]:
    """Compile the libraries of every instruction set of this kind of machine, for images that have no compiler.

    Raises: KernelsUnavailable.
    """
    folder = _shipped_folder()
    folder.mkdir(exist_ok=True)
    machine = platform.machine().lower()
    levels = _X86_LEVELS if machine in _X86_MACHINES else ()
    isas = (*(Isa(name, flags) for name, _, flags in levels), Isa(machine, ()))
    return tuple(_build_in(folder, isa) for isa in isas)


def _shipped_folder() -> Path:
    return SOURCES / "shipped"


def _find_shipped(isa: Isa) -> NativeBuild | None:
    """The library in the image, unless the sources were changed since."""
    found = sorted(_shipped_folder().glob(f"{isa.name}-{_sources_digest(isa)}-*.so"))
    return NativeBuild(found[0], isa, found[0].stem) if found else None


def _build_in(folder: Path, isa: Isa) -> NativeBuild:
    compiler = _find_compiler()
    key = f"{isa.name}-{_sources_digest(isa)}-{_compiler_digest(compiler)}"
    path = folder / f"{key}.so"
    if not path.exists():
        with (folder / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(isa, compiler, path)
    return NativeBuild(path, isa, key)


def _compile(isa: Isa, compiler: tuple[str, ...], path: Path) -> None:
    began = time.monotonic()
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
        part_path = Path(part.name)
    try:
        command = [*compiler, *_FLAGS, *isa.flags, str(SOURCES / "baton.cpp"), "-o", str(part_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            raise KernelsUnavailable(f"{' '.join(compiler)} failed:\n{done.stderr[-2000:]}")
        part_path.chmod(0o755)
        os.replace(part_path, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"cannot compile the kernels: {error}") from error
    finally:
        part_path.unlink(missing_ok=True)
    log.info("compiled native kernels", extra={"isa": isa.name, "seconds": round(time.monotonic() - began, 1)})


def _find_compiler() -> tuple[str, ...]:
    named = os.environ.get("CXX")
    candidates = [named] if named else ["c++", "g++", "clang++"]
    for candidate in candidates:
        words = candidate.split()
        if words and shutil.which(words[0]):
            return tuple(words)
    if not named and importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "c++")
    raise KernelsUnavailable(f"no C++ compiler: tried {', '.join(candidates)} and the package ziglang; install g++")


def _sources_digest(isa: Isa) -> str:
    digest = hashlib.sha256()
    for source in sorted((*SOURCES.glob("*.hpp"), *SOURCES.glob("*.cpp"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update("\0".join((isa.name, *_FLAGS, *isa.flags)).encode())
    return digest.hexdigest()[:16]


def _compiler_digest(compiler: tuple[str, ...]) -> str:
    """Part of the key, since another compiler may round differently (it enters the numerics fingerprint)."""
    return hashlib.sha256("\0".join((*compiler, _compiler_version(compiler))).encode()).hexdigest()[:8]


def _compiler_version(compiler: tuple[str, ...]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsUnavailable(f"{' '.join(compiler)} --version failed: {error}") from error
    return done.stdout


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(root) / "baton" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KernelsUnavailable(f"cannot write the kernel cache {folder}: {error}; set XDG_CACHE_HOME") from error
    return folder


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


if __name__ == "__main__":
    for built in ship() if "--ship" in sys.argv else (build(),):
        sys.stdout.write(f"{built.isa.name} {built.path}\n")
