"""`python -m tests.fake_worker prefill|decode ...`: a real worker process over a fake model, up in a second.

`prefill+device`: with KV as on a device, where no transport may touch it.
"""

from __future__ import annotations

import sys

from decode_service import worker as decode_worker
from decode_service.config import DecodeConfig
from kvtransfer.protocol import baton_pb2 as pb
from prefill_service import worker as prefill_worker
from prefill_service.config import PrefillConfig
from servicekit.config import load
from tests.workers_harness import FakeModel
from workerkit.process import run_process


def main() -> None:
    (role, _, where), arguments = sys.argv[1].partition("+"), sys.argv[2:]
    model = FakeModel(step_s=0.01, on_device=where == "device")
    if role == "prefill":
        prefill = load(PrefillConfig, prog="fake prefill", argv=arguments)
        run_process(lambda process: prefill_worker.serve(prefill, process), prefill, pb.ROLE_PREFILL, model)
    else:
        decode = load(DecodeConfig, prog="fake decode", argv=arguments)
        run_process(lambda process: decode_worker.serve(decode, process), decode, pb.ROLE_DECODE, model)


if __name__ == "__main__":
    main()
