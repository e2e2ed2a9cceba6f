"""A stand-in for gateway and workers that obeys the same flags: it tests the supervisor, not the product.

What it should do wrong is in FAKE_FAULTS, a JSON object of worker id to fault: "config" (exit 2), "model" (exit 78),
"crash" (exit 1), "stuck" (never ready), "deaf" (ignores SIGTERM and the closing of the parent's pipe), "stalled"
(/livez says 503).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from servicekit.lifecycle import write_atomically


def main(role: str) -> None:
    options, _ = _parser().parse_known_args()
    worker_id = options.worker_id or role
    fault = json.loads(os.environ.get("FAKE_FAULTS", "{}")).get(worker_id, "")
    assert Path(options.secret_file).stat().st_mode & 0o777 == 0o600
    if fault in ("config", "model", "crash"):
        print(f"{worker_id}: error: --nonsense = 7: must be at most 6", file=sys.stderr)
        raise SystemExit({"config": 2, "model": 78, "crash": 1}[fault])
    host, _, port = options.http.rpartition(":")
    started = threading.Event()
    server = ThreadingHTTPServer((host, int(port)), _handler(fault, Path(options.registry_dir), started))
    entry = Path(options.registry_dir) / f"{worker_id}.json"
    if role != "gateway":
        http = f"{host}:{server.server_address[1]}"
        write_atomically(entry, json.dumps({"worker_id": worker_id, "http": http, "pid": os.getpid()}).encode())
    if fault == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        threading.Thread(target=_end_with_parent, args=(options.parent_fd,), daemon=True).start()
    print(f"{worker_id} is up", flush=True)
    threading.Timer(0.3, started.set).start()
    server.serve_forever(poll_interval=0.02)
    entry.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--http", required=True)
    parser.add_argument("--parent-fd", type=int, required=True)
    parser.add_argument("--registry-dir", required=True)
    parser.add_argument("--secret-file", required=True)
    parser.add_argument("--worker-id")
    return parser


def _end_with_parent(fd: int) -> None:
    while os.read(fd, 1):
        pass
    os._exit(75)


def _handler(fault: str, registry: Path, started: threading.Event) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_good = started.is_set() and not (fault == "stuck" or (fault == "stalled" and self.path == "/livez"))
            if self.path == "/metrics":
                pools = {pool: len(list(registry.glob(f"{pool}-*.json"))) for pool in ("prefill", "decode")}
                lines = [f"baton_gateway_{pool}_workers {met:.1f}\n" for pool, met in pools.items()]
                return self._answer(200, "text/plain", "".join(lines).encode())
            body = json.dumps({"state": "starting", "phase": "fake phase", "percent": 50.0}).encode()
            self._answer(200 if is_good else 503, "application/json", body)

        def do_POST(self) -> None:
            events = [{"choices": [{"text": ""}]}, {"choices": [{"text": " there"}]}]
            body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
            self._answer(200, "text/event-stream", body.encode())

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's word
            """Probes come ten times a second; the log is for what matters."""

    return Handler
