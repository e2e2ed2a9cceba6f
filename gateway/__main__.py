"""python -m gateway: read the settings, then start what is slow to import."""

from __future__ import annotations

from gateway.config import GatewayConfig
from servicekit.config import load


def main() -> None:
    config = load(
        GatewayConfig, prog="python -m gateway", description="OpenAI-compatible gateway of one Baton service."
    )
    from gateway.process import run  # after --help

    run(config)


if __name__ == "__main__":
    main()
