"""Compiles one case for one architecture and reads what came out; results are kept on disk.

The one file of the gate that touches Triton and its tools (ptxas, nvdisasm), which its wheel carries.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.compile_gate.sass import Counts, Disassembly, read_disassembly
from engine.kernels.compile_case import CompileCase

CACHE = Path.home() / ".cache" / "baton" / "compile-gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What one kernel takes on one architecture; `error` says why there is nothing else to say."""

    error: str = ""
    registers: int = 0
    spill_bytes: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    tensor_columns: int = 0
    num_warps: int = 0
    code: Disassembly | None = None


def triton_version() -> str:
    import triton

    return triton.__version__


def compile_case(case: CompileCase, arch: int) -> Compiled:
    """Everything but an internal error of ours becomes `error`: the gate goes on with the next case."""
    try:
        source = source_of(case, arch)
        log, kernel = _compile(source, arch, _options(case, arch))
        return _read(log, kernel)
    except Exception as error:  # whatever the compiler raises is its verdict on this case
        return Compiled(error=_short(error))


def source_of(case: CompileCase, arch: int) -> Any:
    """The case as Triton's compiler wants it."""
    from triton.compiler import ASTSource

    fn: Any = case.kernel()
    constants: Mapping[str, Any] = case.config(arch).constants
    _check_arguments(case, fn.arg_names, constants)
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    types = {name: "constexpr" if name in constants else case.signature[name] for name in fn.arg_names}
    return ASTSource(fn, signature=types, constexprs=dict(constants), attrs=attributes)


def _check_arguments(case: CompileCase, names: list[str], constants: Mapping[str, Any]) -> None:
    given = {*case.signature, *constants}
    if both := sorted({*case.signature} & {*constants}):
        raise ValueError(f"{both} are in the signature and among the constants")
    if missing := sorted({*names} - given):
        raise ValueError(f"neither the signature nor the constants say what {missing} are")
    if unknown := sorted((given | {*case.aligned}) - {*names}):
        raise ValueError(f"the kernel has no arguments {unknown}")


def _options(case: CompileCase, arch: int) -> dict[str, Any]:
    config = case.config(arch)
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, **config.extra}


def _compile(source: Any, arch: int, options: Mapping[str, Any]) -> tuple[str, Any]:
    """What ptxas said, and the compiled kernel. Triton's own cache would keep the kernel but not what ptxas said."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(said):
            kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
    return said.getvalue(), kernel


def _read(log: str, kernel: Any) -> Compiled:
    def bytes_of(words: str) -> int:
        found = re.search(rf"(\d+) bytes {words}", log)
        if found is None:
            raise ValueError(f"ptxas does not say how many bytes of {words}: {log!r}")
        return int(found[1])

    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise ValueError(f"ptxas does not say how many registers: {log!r}")
    return Compiled(
        registers=int(registers[1]),
        spill_bytes=bytes_of("spill stores") + bytes_of("spill loads"),
        stack_bytes=bytes_of("stack frame"),
        shared_bytes=kernel.metadata.shared,
        tensor_columns=getattr(kernel.metadata, "tmem_size", None) or 0,
        num_warps=kernel.metadata.num_warps,
        code=read_disassembly(_disassemble(kernel.asm["cubin"])),
    )


def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _short(error: Exception) -> str:
    """The last lines hold the reason, the ones before them the way there."""
    lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return " | ".join(lines if len(lines) < 6 else [lines[0], *lines[-4:]])[:600]


# ---------------------------------------------------------------- results on disk


def cache_key(case: CompileCase, arch: int) -> str:
    """Of all that the result depends on: source, types, constants, options, Triton, and how we read it."""
    source = source_of(case, arch)
    parts = [
        source.hash(), triton_version(), str(arch), str(sorted(_options(case, arch).items())),
        str(sorted((name, str(value)) for name, value in case.config(arch).constants.items())),
        *(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem in ("sass", "compiler")),
    ]  # fmt: skip
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load(folder: Path, key: str) -> Compiled | None:
    try:
        found = json.loads((folder / f"{key}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    code = found.pop("code")
    parts = {name: Counts(**code[name]) for name in ("kernel", "loop")}
    return Compiled(**found, code=Disassembly(**parts, tensor_name=code["tensor_name"]))


def save(folder: Path, key: str, result: Compiled) -> None:
    """Whole or not at all: another gate may be reading. What failed is tried again next time."""
    if result.error:
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{key}.{os.getpid()}"
    part.write_text(json.dumps(asdict(result)))
    part.replace(folder / f"{key}.json")
