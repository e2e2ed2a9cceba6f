"""A cluster to work with: `tests/cluster/up [control-plane|node]` and `tests/cluster/down`."""

from __future__ import annotations

import argparse
import sys

from tests.cluster import build, launch, runs
from tests.cluster.errors import ClusterError
from tests.cluster.supervisor import STARTS


def up(tier: str) -> None:
    build.ensure_tier(tier, _say)
    cluster = launch.launch(tier).cluster
    _say(f"{tier} is ready; end it with tests/cluster/down")
    print(f"export KUBECONFIG={cluster.kubeconfig}")
    if cluster.init_pid is not None:
        _say(f"its namespaces: nsenter --target={cluster.init_pid} --mount --net --pid")
        _say(f"its containerd: ctr --address={cluster.containerd_socket} --namespace=k8s.io images import FILE")


def down() -> None:
    """End this user's clusters that a developer started (a test run ends its own) and clean up what dead ones left."""
    for folder in launch.found():
        if (folder / launch.DETACHED_FILE).exists():
            launch.end(folder)
            _say(f"ended {folder.name}")
    runs.clean_leftovers()


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up").add_argument("tier", nargs="?", choices=STARTS, default="control-plane")
    commands.add_parser("down")
    options = parser.parse_args()
    try:
        if options.command == "up":
            up(options.tier)
        else:
            down()
    except ClusterError as error:
        _say(str(error))
        return 1
    return 0


def _say(line: str) -> None:
    """On stderr: stdout is for `eval "$(tests/cluster/up)"`."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
