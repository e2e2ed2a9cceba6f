"""Make a CPU-only torch out of the package index's CUDA build: 0.5 GB instead of 4.7 GB of site-packages.

    python images/cut_cuda.py /opt/baton/lib/python3.11/site-packages

The CUDA half is a handful of shared libraries that the linker wants to see and that nothing on a CPU calls. They go;
stand-ins with the symbols that the CPU half names take their place, each function of which ends the process with its
own name. libcudart stays (1 MB): `torch.cuda.is_available()` asks it and gets an honest no. Does nothing to a torch
that was built for the CPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

CUDA_HALF = ("libtorch_cuda.so", "libtorch_cuda_linalg.so", "libtorch_nvshmem.so", "libcaffe2_nvrtc.so")
NOT_AT_RUN_TIME = ("torch/include", "torch/share", "triton")
SYSTEM_LIBRARIES = re.compile(r"(libc|libm|libstdc\+\+|libgcc_s|libpthread|libdl|librt|ld-linux[\w-]*|libgomp)\.so")
CALLED_AT_IMPORT = ("_ZN4c10d15get_gil_checkerEv",)  # answers where a hook is stored; nobody on a CPU reads it
_HAS_DISTRIBUTED = re.compile(r'hasattr\(torch\._C, "_(c10d|rpc|dist_autograd|faulty_agent)_init"\)')
HOME_OF_UNVERSIONED = "libtorch_cuda.so"


def main(site: Path) -> None:
    before = _size_mb(site)
    if not (site / "torch" / "lib" / HOME_OF_UNVERSIONED).exists():
        print("torch is a CPU build already")
        return
    remove(site)
    switch_off_distributed(site)
    stand_ins = missing_symbols(site)
    for library, symbols in sorted(stand_ins.items()):
        make_stand_in(site / "torch" / "lib" / library, symbols)
        print(f"{library}: {len(symbols)} symbols")
    print(f"{before} MB -> {_size_mb(site)} MB")


def remove(site: Path) -> None:
    for library in CUDA_HALF:
        (site / "torch" / "lib" / library).unlink(missing_ok=True)
    for folder in NOT_AT_RUN_TIME:
        shutil.rmtree(site / folder, ignore_errors=True)
    for library in site.glob("nvidia/**/*"):
        if library.is_file() and not library.name.startswith("libcudart.so"):
            library.unlink()


def switch_off_distributed(site: Path) -> None:
    """torch.distributed makes NCCL's options when it is imported. Torch knows builds without it, as on macOS.

    Raises: SystemExit if this torch asks for it in another way than the ones that this was written for.
    """
    found = 0
    torch = site / "torch"
    for path in (torch / "__init__.py", *(torch / "distributed").rglob("__init__.py")):
        text, replaced = _HAS_DISTRIBUTED.subn("False", path.read_text())
        if replaced:
            path.write_text(text)
            found += replaced
    if not found:
        raise SystemExit("this torch asks in another way whether it has torch.distributed; mend images/cut_cuda.py")


def missing_symbols(site: Path) -> dict[str, set[str]]:
    """By library that is asked for and not there: the symbols wanted of it, `name` or `name@version`."""
    kept = [*site.glob("torch/lib/*.so*"), *site.glob("torch/_C*.so")]
    system = _system_libraries()
    present = [*kept, *site.glob("nvidia/**/libcudart.so*")]
    defined = {name.split("@")[0] for path in (*present, *system) for name in _symbols(path, "--defined-only")}
    there = {path.name for path in (*present, *system)}
    wanted: dict[str, set[str]] = defaultdict(set)
    for path in kept:
        for library in _needed(path):
            if library not in there:
                wanted[library] |= set()
        for symbol in _symbols(path, "--undefined-only"):
            name, _, version = symbol.partition("@")
            if name not in defined:
                wanted[version.lstrip("@") or HOME_OF_UNVERSIONED].add(symbol)
    return dict(wanted)


def make_stand_in(path: Path, symbols: Iterable[str]) -> None:
    names = sorted(symbol.partition("@")[0] for symbol in symbols)
    versions = sorted({symbol.rpartition("@")[2] for symbol in symbols if "@" in symbol})
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "stand_in.c"), Path(folder, "versions")
        source.write_text("\n".join([_PRELUDE, *map(_definition, names)]))
        script.write_text("".join(f"{version} {{ global: *; }};\n" for version in versions))
        options = [f"-Wl,--version-script={script}"] if versions else []
        # -lstdc++: type information derives from the C++ library's own
        command = ["gcc", "-shared", "-fPIC", "-w", "-O1", f"-Wl,-soname,{path.name}", *options, str(source)]
        subprocess.run([*command, "-o", str(path), "-lstdc++"], check=True)


_PRELUDE = """
#include <stdio.h>
#include <stdlib.h>
static void end(const char *name) { fprintf(stderr, "this torch has no CUDA half: %s\\n", name); abort(); }
extern void *_ZTVN10__cxxabiv117__class_type_infoE[];
"""


def _definition(name: str) -> str:
    """C for a symbol: type information that Python's bindings register, a table of methods, or a function."""
    if name.startswith("_ZTI"):
        label = f'static const char label_{name}[] = "{name.removeprefix("_ZTI")}";'
        return f"{label} const void *{name}[2] = {{&_ZTVN10__cxxabiv117__class_type_infoE[2], label_{name}}};"
    if name.startswith("_ZTV"):
        return f"void *{name}[64];"
    if name in CALLED_AT_IMPORT:
        return f"void *{name}(void) {{ static char nothing[64]; return nothing; }}"
    return f'void {name}(void) {{ end("{name}"); }}'


def _symbols(path: Path, which: str) -> list[str]:
    """Names of dynamic symbols; weak ones that nobody needs to define are left out."""
    rows = [line.split() for line in _output("nm", "-D", which, str(path)).splitlines()]
    return [row[-1] for row in rows if len(row) >= 2 and row[-2] != "w"]


def _needed(path: Path) -> list[str]:
    return re.findall(r"NEEDED.*\[(.+?)\]", _output("readelf", "-d", "-W", str(path)))


def _system_libraries() -> list[Path]:
    lines = _output("/sbin/ldconfig", "-p").splitlines()
    paths = [Path(line.rpartition("=> ")[2]) for line in lines if SYSTEM_LIBRARIES.match(line.strip())]
    return [path for path in paths if path.exists()]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _size_mb(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) >> 20


if __name__ == "__main__":
    main(Path(sys.argv[1]))
