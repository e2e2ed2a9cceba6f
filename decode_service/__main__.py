"""`python -m decode_service`: one decode worker."""

from __future__ import annotations

from decode_service.config import DecodeConfig
from servicekit.config import load


def main() -> None:
    config = load(DecodeConfig, prog="python -m decode_service", description="One decode worker of a Baton service.")
    # Imported after the settings: `--help` and a wrong flag answer in a tenth of a second.
    from decode_service.worker import serve
    from kvtransfer.protocol import baton_pb2 as pb
    from workerkit.process import run_process

    run_process(lambda process: serve(config, process), config, pb.ROLE_DECODE)


if __name__ == "__main__":
    main()
