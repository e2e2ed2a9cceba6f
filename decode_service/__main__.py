"""`python -m decode_service`: one decode worker."""

from __future__ import annotations

from decode_service.config import DecodeConfig
from servicekit.config import load


def main() -> None:
    config = load(DecodeConfig, prog="python -m decode_service", description="One decode worker of a Baton service.")
    # After the settings: `--help` and a wrong flag answer in a tenth of a second.
    from decode_service.worker import serve
    from workerkit.process import run_process

    run_process(lambda: serve(config), config, "decode")


if __name__ == "__main__":
    main()
