"""The tables of docs/kernels.md. The one of our cases: a row per case, figures of sm_90, and which Triton made them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bench.compile_gate.cases import Job
from bench.compile_gate.compiler import Compiled
from bench.compile_gate.judge import model, occupancy_of
from bench.devices import DEVICES

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
ARCH = 90
_HEAD = (
    "Kernel", "Shape", "Registers", "Shared memory", "Warps", "Programs per SM", "Tensor instructions",
    "Loads 128 bits / narrower", "FLOP per byte", "Bound on an H100 / H200 (model)",
)  # fmt: skip


def write(results: Sequence[tuple[Job, Compiled]], triton_version: str) -> None:
    rows = [_row(job, result) for job, result in results if job.arch == ARCH]
    lines = [_HEAD, tuple("---" for _ in _HEAD), *rows]
    text = f"Triton {triton_version}, sm_{ARCH}.\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_table("compiled", text)


def write_table(name: str, text: str) -> None:
    """Replace what stands between `<!-- table: NAME -->` and the next `<!-- end -->`."""
    PAGE.write_text(_marked(name).sub(lambda found: found[1] + text + found[2], PAGE.read_text(), count=1))


def _marked(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)


def missing(jobs: Sequence[Job]) -> list[str]:
    """Rows that the page lacks, or has of cases that are gone. Its figures change with Triton: not compared."""
    found = _marked("compiled").search(PAGE.read_text())
    rows = set(re.findall(r"^(\| `[^|]*\| [^|]* \|)", found[0] if found else "", re.MULTILINE))
    expected = {_title(job) for job in jobs if job.arch == ARCH}
    return sorted(expected ^ rows)


def _title(job: Job) -> str:
    return f"| `{job.op}/{job.case.name}` | {job.case.shape} |"


def _row(job: Job, result: Compiled) -> tuple[str, ...]:
    name, shape = f"`{job.op}/{job.case.name}`", job.case.shape
    if result.code is None:
        return (name, shape, "does not compile", *([""] * (len(_HEAD) - 3)))
    code = result.code.kernel
    bounds = [model(job.case, result, device).bound for device in DEVICES if device.arch == ARCH]
    return (
        name, shape, str(result.registers), str(result.shared_bytes), str(result.num_warps),
        str(occupancy_of(result, ARCH).programs),
        f"{code.tensor} {result.code.tensor_name}" if code.tensor else "",
        f"{code.wide_loads} / {code.narrow_loads}", f"{job.case.flops / job.case.bytes:.2g}", " / ".join(bounds),
    )  # fmt: skip
