"""`python -m prefill_service`: one prefill worker."""

from __future__ import annotations

from prefill_service.config import PrefillConfig
from servicekit.config import load


def main() -> None:
    config = load(PrefillConfig, prog="python -m prefill_service", description="One prefill worker of a Baton service.")
    # After the settings: `--help` and a wrong flag answer in a tenth of a second.
    from prefill_service.worker import serve
    from workerkit.process import run_process

    run_process(lambda: serve(config), config, "prefill")


if __name__ == "__main__":
    main()
