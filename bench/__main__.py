"""`python -m bench [NAME ...]`: run the benchmarks one after another (default: all), each in a process of its own.

One after another because two cores measure one thing at a time; in processes of their own so that none inherits
another's threads, caches or peak memory. A benchmark's own options: `python -m bench.NAME --help`. `gpu` needs one and
runs only when it is named.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

BENCHMARKS = ("scheduler", "long_prompt", "engine", "swap", "transfer", "gateway", "pd", "operator")
NEED_A_GPU = ("gpu",)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="*",
        choices=[*BENCHMARKS, *NEED_A_GPU, []],
        metavar="NAME",
        help=" | ".join((*BENCHMARKS, *NEED_A_GPU)),
    )
    failed = [name for name in parser.parse_args().names or BENCHMARKS if not run(name)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(name: str) -> bool:
    print(f"\n== python -m bench.{name}", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, "-m", f"bench.{name}"], check=False).returncode
    print(f"== {name}: exit code {code}, {time.monotonic() - started:.0f} s", flush=True)
    return code == 0


if __name__ == "__main__":
    main()
