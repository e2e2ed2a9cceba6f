"""python -m baton_operator run: the operator.  crd: the CustomResourceDefinitions.  role: the rights it needs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import yaml

from baton_operator import crd, kinds
from baton_operator.desired import Platform


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "crd":
        sys.stdout.write(crd.render())
        return 0
    if options.command == "role":
        sys.stdout.write(yaml.safe_dump(kinds.rules(), sort_keys=False))
        return 0
    from baton_operator.run import run  # kopf and the client take a second to import

    return run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m baton_operator", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    default = Platform()
    commands.add_parser("crd", help="print the CustomResourceDefinitions")
    commands.add_parser("role", help="print the rules of the Role that `run` needs")
    run = commands.add_parser("run", help="watch LLMServices and make what they ask for")
    scope = run.add_mutually_exclusive_group()
    _option(scope, "--namespace", "NAMES", "namespaces to watch, separated by commas; default: the operator's own")
    scope.add_argument(
        "--cluster", action="store_true", default=os.environ.get("BATON_CLUSTER") == "true",
        help="watch every namespace (needs a ClusterRole)",
    )  # fmt: skip
    _option(run, "--http", "HOST:PORT", "health and metrics", "0.0.0.0:8080")
    _option(run, "--gateway-image", "IMAGE", "gateways of services that name none", default.gateway_image)
    _option(run, "--worker-image", "IMAGE", "workers without a GPU of services that name none", default.worker_image)
    _option(run, "--gpu-worker-image", "IMAGE", "workers with GPUs", default.gpu_worker_image)
    _option(run, "--redis-image", "IMAGE", "managed Redis", default.redis_image)
    _option(run, "--operator-namespace", "NAME", "where the operator runs; default: that of its pod")
    _option(run, "--resync-s", "SECONDS", "how often everything is listed and looked at again", "900")
    _option(run, "--secret-check-s", "SECONDS", "how often it is checked that Secrets are still there", "3600")
    _option(run, "--peering", "NAME", "kopf peering of this name (for a second operator beside it); default: off")
    _option(run, "--log-level", "LEVEL", "debug, info, warning or error", "info")
    return parser


def _option(parser: argparse._ActionsContainer, flag: str, metavar: str, meaning: str, default: str = "") -> None:  # pyright: ignore[reportPrivateUsage]
    """A flag that a variable BATON_<FLAG> gives, too."""
    variable = f"BATON_{flag.strip('-').upper().replace('-', '_')}"
    text = f"{meaning} (${variable}{f'; default: {default}' if default else ''})"
    parser.add_argument(flag, metavar=metavar, default=os.environ.get(variable, default), help=text)


if __name__ == "__main__":
    sys.exit(main())
