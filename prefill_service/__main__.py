"""`python -m prefill_service`: one prefill worker."""

from __future__ import annotations

from prefill_service.config import PrefillConfig
from servicekit.config import load


def main() -> None:
    config = load(PrefillConfig, prog="python -m prefill_service", description="One prefill worker of a Baton service.")
    # Imported after the settings: `--help` and a wrong flag answer in a tenth of a second.
    from kvtransfer.protocol import baton_pb2 as pb
    from prefill_service.worker import serve
    from workerkit.process import run_process

    run_process(lambda process: serve(config, process), config, pb.ROLE_PREFILL)


if __name__ == "__main__":
    main()
