"""Which test files deserve a second try, alone on the machine: prints them, or says on stderr why none does, exit 1.

Tests that start real processes share two cores with hundreds of others, and one in thousands misses a deadline by that.
Such a file may run again, whole, since its tests may build on each other; if it fails again, CI fails. What starts no
process has no such excuse, and many files at once are a breakage. What passed at the second try is printed as unstable.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAST_FAILED = ROOT / ".pytest_cache" / "v" / "cache" / "lastfailed"
WITH_PROCESSES = ("tests/cluster/", "tests/e2e/", "tests/integration/")
MAX_FILES = 3


def main() -> int:
    try:
        failed = json.loads(LAST_FAILED.read_text())
    except (OSError, ValueError):
        print("no list of failed tests: they did not run to their end", file=sys.stderr)
        return 1
    files = sorted({test.split("::")[0] for test in failed})
    steady = [file for file in files if not file.startswith(WITH_PROCESSES)]
    if steady or not 0 < len(files) <= MAX_FILES:
        print(f"no second try: {len(files)} files failed, of which {len(steady)} start no process", file=sys.stderr)
        return 1
    print(*files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
