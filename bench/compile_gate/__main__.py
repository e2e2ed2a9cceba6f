"""`python -m bench.compile_gate`: compile every kernel that ships for sm_80, sm_90 and sm_100; 1 if it refuses one.

    python -m bench.compile_gate [--op attention ...] [--arch 90] [--json FILE] [--module NAME ...]

Needs no GPU. A kernel is refused if it does not compile, spills, takes more shared memory than there is, fits an SM
less often than planned, has a dot but no tensor-core instruction, or does not load 128 bits at a time where it should.
Results are kept in ~/.cache/baton/compile-gate by what they depend on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bench.compile_gate import compiler, docs
from bench.compile_gate.cases import Job, collect, modules_without_cases, shipped_modules
from bench.compile_gate.compiler import Compiled
from bench.compile_gate.judge import occupancy_of, problems
from engine.dispatch import set_up_compiler

PROCESSES = 2
# A tile far too large for its warps keeps the compiler busy for hours; ours take 1 to 5 s each.
MAX_CPU_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Verdict:
    job: Job
    result: Compiled
    problems: tuple[str, ...]


def main() -> int:
    args = _arguments()
    if os.environ.get("TRITON_INTERPRET"):
        print("TRITON_INTERPRET is set: in the interpreter there is nothing to compile", file=sys.stderr)
        return 2
    set_up_compiler()
    started = time.monotonic()
    modules = args.module or [name for name in shipped_modules() if not args.op or name.split(".")[-2] in args.op]
    jobs = [job for job in collect(modules) if not args.arch or job.arch in args.arch]
    if args.check_docs:
        different = docs.missing(jobs)
        print("\n".join(different))
        return 1 if different else 0
    verdicts = judge(jobs, args.cache)
    if args.docs:
        docs.write([(verdict.job, verdict.result) for verdict in verdicts], compiler.triton_version())
    print(table(verdicts))
    if args.json:
        args.json.write_text(json.dumps(report(verdicts), indent=1) + "\n")
    refused = [f"REFUSED {name}: lists no COMPILE_CASES" for name in modules_without_cases(modules)]
    refused += [f"REFUSED {verdict.job.title}: {problem}" for verdict in verdicts for problem in verdict.problems]
    print("\n".join(refused))
    print(
        f"{len(verdicts)} compilations, {len({v.job.title for v in verdicts if v.problems})} refused, "
        f"Triton {compiler.triton_version()}, {time.monotonic() - started:.0f} s"
    )
    return 1 if refused or not verdicts else 0


def judge(jobs: Sequence[Job], cache: Path = compiler.CACHE) -> list[Verdict]:
    """Each job compiled, or found where it was kept, and judged; in the order of `jobs`."""
    keys = [_key(job) for job in jobs]
    results = {key: found for key in keys if (found := compiler.load(cache, key)) is not None}
    todo = {key: job for key, job in zip(keys, jobs, strict=True) if key not in results}
    for key, result in compile_all(todo):
        compiler.save(cache, key, result)
        results[key] = result
    return [
        Verdict(job, results[key], tuple(problems(job.case, job.arch, results[key])))
        for key, job in zip(keys, jobs, strict=True)
    ]


def _key(job: Job) -> str:
    try:
        return compiler.cache_key(job.case, job.arch)
    except Exception:  # compiling it will say why
        return job.title


def compile_all(todo: dict[str, Job]) -> Iterator[tuple[str, Compiled]]:
    """In a process each, two at a time: a compiler that aborts takes no other case with it."""
    context = multiprocessing.get_context("fork")  # kernels and Triton are imported already
    waiting = list(todo.items())
    running: dict[Connection, tuple[str, BaseProcess]] = {}
    while waiting or running:
        while waiting and len(running) < PROCESSES:
            key, job = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_compile_into, args=(theirs, job))
            process.start()
            theirs.close()
            running[ours] = key, process
        for end in wait(list(running)):
            assert isinstance(end, Connection)
            key, process = running.pop(end)
            result = None
            with suppress(EOFError):
                result = end.recv()
            end.close()
            process.join()
            yield key, result or Compiled(error=f"the compiler died: {_death(process.exitcode)}")


def _death(exit_code: int | None) -> str:
    if exit_code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"killed, perhaps after {MAX_CPU_SECONDS} s of processor time; a smaller tile"
    return f"exit code {exit_code}"


def _compile_into(end: Connection, job: Job) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS))  # ptxas inherits it
    end.send(compiler.compile_case(job.case, job.arch))


def report(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """All of it for another program; an object per compilation, keyed as its title says."""
    return {
        "triton": compiler.triton_version(),
        "compilations": [
            {
                "op": v.job.op, "name": v.job.case.name, "shape": v.job.case.shape, "arch": v.job.arch,
                "problems": list(v.problems), **asdict(v.result),
            }
            for v in verdicts
        ],
    }  # fmt: skip


def table(verdicts: Sequence[Verdict]) -> str:
    """A line per compilation. "loop" is instructions of one turn of the main loop, and the tensor ones among them."""
    width = max((len(v.job.title) for v in verdicts), default=0)
    lines = [f"{'kernel':{width}}  regs spill shared warps prog/SM  tensor       loop  wide narrow loads"]
    for verdict in verdicts:
        result = verdict.result
        mark = "  REFUSED" if verdict.problems else ""
        if result.code is None:
            lines.append(f"{verdict.job.title:{width}}  -{mark}")
            continue
        code, loop = result.code.kernel, result.code.loop
        tensor = f"{code.tensor} {result.code.tensor_name}" if code.tensor else "-"
        lines.append(
            f"{verdict.job.title:{width}}  {result.registers:4} {result.spill_bytes:5} {result.shared_bytes:6} "
            f"{result.num_warps:5} {occupancy_of(result, verdict.job.arch).programs:7}  {tensor:12} "
            f"{loop.total:4}/{loop.tensor:<3} {code.wide_loads:4} {code.narrow_loads:6}{mark}"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compile_gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", action="append", help="only this folder of engine/kernels")
    parser.add_argument("--arch", action="append", type=int, choices=[80, 90, 100])
    parser.add_argument("--module", action="append", help="cases of this module instead of those that ship")
    parser.add_argument("--json", type=Path, help="write everything there too")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/kernels.md")
    parser.add_argument("--check-docs", action="store_true", help="compile nothing; 1 if that table lacks a case")
    parser.add_argument("--cache", type=Path, default=compiler.CACHE)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
