"""Keep of NIXL what moves KV: 72 MB instead of 221 MB of site-packages.

    python images/cut_nixl.py /opt/baton/worker
    python images/cut_nixl.py --check                  and prove that Python finds it and that nothing is missing

The wheel brings plugins for files, object stores and clouds, a library of GPU kernels for each torch (nixl_ep), and
tools. Kept are the bindings, the UCX plugin, the modules that UCX opens by name, and every library that these link;
CUDA's modules too: without a driver UCX passes them over. Does nothing where NIXL is not installed.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

PACKAGE = re.compile(r"nixl_cu\d+")
ROOTS = re.compile(r"(_bindings\..*|_utils\..*|libplugin_UCX|libuc[pmst]-|libuc[mt]_\w+)\S*\.so")
"""What is opened by name: by Python, by NIXL and by UCX."""


def main(site: Path) -> None:
    folders = [folder for folder in site.iterdir() if "nixl" in folder.name and folder.is_dir()]
    package = next((folder.name for folder in folders if PACKAGE.fullmatch(folder.name)), None)
    if package is None:
        print("NIXL is not installed")
        return
    before = _size_mb(folders)
    for folder in folders:
        if folder.name.startswith("nixl_ep") or folder.name.endswith(".scripts"):
            shutil.rmtree(folder)
    libraries = {path.name: path for folder in folders for path in folder.rglob("*.so*")}
    kept = closure({name for name in libraries if ROOTS.match(name)}, {n: needed(p) for n, p in libraries.items()})
    for name, path in libraries.items():
        if name not in kept:
            path.unlink()
    print(f"{package}: {len(kept)} of {len(libraries)} libraries, {before} MB -> {_size_mb(folders)} MB")


def check() -> None:
    """Links the bindings and the UCX plugin, every symbol at once, and UCX's own libraries with them.

    Raises: ImportError, OSError that name what is missing.
    """
    for package in ("nixl_cu13", "nixl_cu12"):
        if spec := importlib.util.find_spec(package):
            importlib.import_module(f"{package}._bindings")
            site = Path(spec.origin or "").parents[1]
            (plugin,) = site.glob(f".{package}.mesonpy.libs/plugins/libplugin_UCX.so")
            ctypes.CDLL(str(plugin), mode=os.RTLD_NOW)
            print(f"{package} loads")
            return
    raise ImportError("NIXL is not installed")


def closure(roots: Iterable[str], links: Mapping[str, Iterable[str]]) -> set[str]:
    """The roots and all that they link, as far as it is here; the rest is the system's."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in links and name not in found:
            found.add(name)
            waiting += links[name]
    return found


def needed(library: Path) -> list[str]:
    told = subprocess.run(["readelf", "-d", "-W", str(library)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"NEEDED.*\[(.+?)\]", told)


def _size_mb(folders: Iterable[Path]) -> int:
    files = [path for folder in folders if folder.exists() for path in folder.rglob("*")]
    return sum(path.stat().st_size for path in files if path.is_file() and not path.is_symlink()) >> 20


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        check()
    else:
        main(Path(sys.argv[1]))
