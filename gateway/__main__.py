"""python -m gateway: read the settings, then start what is slow to import."""

from __future__ import annotations

import os

from gateway.config import GatewayConfig
from servicekit.config import load


def main() -> None:
    config = load(
        GatewayConfig, prog="python -m gateway", description="OpenAI-compatible gateway of one Baton service."
    )
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC's own lines are not JSON; what matters we log ourselves
    from gateway.process import run  # after --help

    run(config)


if __name__ == "__main__":
    main()
