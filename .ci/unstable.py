"""Which test files deserve a second try, alone on the machine: prints them, or says on stderr why none does, exit 1.

    .ci/unstable.py LOG     LOG: what `make test` printed

Tests that start real processes share two cores with hundreds of others, and one in thousands misses a deadline by that.
Such a file may run again, whole, since its tests may build on each other; if it fails again, CI fails. What starts no
process has no such excuse, and many files at once are a breakage. What passed at the second try is printed as unstable.
The log is read, and not pytest's list of failures, because a worker of pytest that died is not on that list.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

WITH_PROCESSES = ("tests/cluster/", "tests/e2e/", "tests/integration/")
MAX_FILES = 3
_FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?\.py)", re.MULTILINE)


def main(log: Path) -> int:
    files = sorted(set(_FAILED.findall(log.read_text(errors="replace"))))
    steady = [file for file in files if not file.startswith(WITH_PROCESSES)]
    if steady or not 0 < len(files) <= MAX_FILES:
        print(f"no second try: {len(files)} files failed, of which {len(steady)} start no process", file=sys.stderr)
        return 1
    print(*files)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
