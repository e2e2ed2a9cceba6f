"""`python -m bench.gpu`: what the kernels do on this GPU, in at most eight minutes; a table, and JSON with --json.

    python -m bench.gpu [--part prefill ...] [--seconds 480] [--json FILE] [--rehearse]

--rehearse runs every part at tiny sizes in Triton's interpreter, so that the run on a GPU works the first time; its
figures mean nothing. Times are CUDA events, medians, with a cold L2 for single kernels and as CUDA graphs where the
engine uses those. A part that fails is named at the end, and the others still run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.gpu.harness import Bench, Figure
from engine.dispatch import Device, Dispatch, Kernels, enter

# Seconds that a part may take, compiling included; together less than the run's eight minutes.
PARTS = {
    "copy": 10, "prefill": 80, "decode": 50, "determinism": 25, "sampler": 30, "fused": 45, "steps": 130,
    "serving": 110,
}  # fmt: skip


def main() -> int:
    args = _arguments()
    if not args.rehearse and not torch.cuda.is_available():
        print("no GPU is visible here; --rehearse runs it in Triton's interpreter", file=sys.stderr)
        return 2
    # Before the first kernel is imported: a kernel is made for the interpreter or for the compiler.
    device = Device.CPU if args.rehearse else Device.CUDA
    enter(Dispatch(Kernels.TRITON, device, "a rehearsal" if args.rehearse else "asked for"))
    torch.manual_seed(0)
    bench = Bench(torch.device(device.value), args.seconds)
    failed = [name for name in args.part or PARTS if not _run(bench, name)]
    if args.json:
        args.json.write_text(json.dumps(report(bench, failed), indent=1) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(bench: Bench, name: str) -> bool:
    """One part; what it raises ends it alone, for a GPU may not be at hand a second time."""
    bench.begin_part(PARTS[name])
    try:
        if name != "copy" and not bench.bandwidth:
            measure_copy(bench)
        _part(name)(bench)
    except Exception:  # one part that fails must not cost the others their minutes on the device
        traceback.print_exc()
        return False
    finally:
        if not bench.is_rehearsal:
            torch.cuda.empty_cache()
    return True


def _part(name: str) -> Callable[[Bench], None]:
    from bench.gpu import attention, fused, sampler, serving, step  # import kernels

    return {
        "copy": measure_copy,
        "prefill": attention.prefill,
        "decode": attention.decode,
        "determinism": attention.determinism,
        "sampler": sampler.sampler,
        "fused": fused.fused,
        "steps": step.steps,
        "serving": serving.serving,
    }[name]


def measure_copy(bench: Bench) -> None:
    """The bandwidth that everything else is held against: bytes read and written by a copy too large for any cache."""
    source = torch.zeros((1 << 20) if bench.is_rehearsal else (2 << 30), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    bench.bandwidth = 2 * source.numel() / bench.seconds_of(lambda: target.copy_(source))
    bench.add(Figure(part="copy", case="2 GiB to another place", unit="GB/s", ours=bench.bandwidth / 1e9))


def report(bench: Bench, failed: list[str]) -> dict[str, Any]:
    import triton

    root = Path(__file__).parents[2]
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "commit": git.stdout.strip(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": "interpreter" if bench.is_rehearsal else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "failed": failed,
        "figures": [asdict(figure) for figure in bench.figures],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this part; may be repeated")
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
