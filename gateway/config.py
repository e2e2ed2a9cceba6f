"""The gateway's settings: one frozen dataclass, from flags, environment and file. Imports nothing slow."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from registry.config import RegistryConfig
from registry.entry import is_address
from servicekit.config import option, parse_address


class Disaggregation(Enum):
    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def _are_addresses(values: tuple[str, ...]) -> str | None:
    return None if all(is_address(value) for value in values) else "each must be HOST:PORT"


@dataclass(frozen=True, kw_only=True)
class GatewayConfig(RegistryConfig):
    """Field names are flag names."""

    model: Path = option(
        help="model folder or .gguf file: its tokenizer, chat template and config are read", metavar="PATH"
    )
    model_id: str = option("", help="name in /v1/models and in requests; empty: the file's own name")
    gateway_id: str = option("gateway", help="this replica's name in logs and towards workers")
    http: tuple[str, int] = option(("127.0.0.1", 8000), help="address of the API; port 0 is any", parse=parse_address, metavar="HOST:PORT")  # fmt: skip  # noqa: E501
    internal_http: tuple[str, int] | None = option(None, help="authenticated port for probes: the only one where worker and path can be forced", parse=parse_address, metavar="HOST:PORT")  # fmt: skip  # noqa: E501
    secret_file: Path | None = option(None, help="file with the service's secret, shown to workers and asked of probes")
    registry_dns: tuple[str, ...] = option((), help="headless Services, one per pool: each address behind them is asked Hello", metavar="HOST:PORT,...", check=_are_addresses)  # fmt: skip  # noqa: E501
    workers_seed: tuple[str, ...] = option((), help="addresses to say Hello to, besides", metavar="HOST:PORT,...")
    routing_file: Path | None = option(None, help='JSON {"servingRevision": ...}: which revision serves; read each second')  # fmt: skip  # noqa: E501
    max_model_len: int = option(0, help="prompt and output together; 0: the model's own limit", minimum=0)
    max_queue_requests: int = option(512, help="requests that may wait for their first token", minimum=1)
    max_queue_tokens: int = option(1_000_000, help="prompt tokens that may wait for their first token", minimum=1)
    max_key_share: float = option(0.5, help="part of the queue one API key may hold, where there are several", minimum=0.01, maximum=1)  # fmt: skip  # noqa: E501
    max_connections: int = option(4096, help="open HTTP connections", minimum=1)
    api_key_file: Path | None = option(
        None, help="file of API keys, one a line (plain or sha256:<hex>); none: open to all"
    )
    disaggregation: Disaggregation = option(Disaggregation.AUTO, help="who prefills: auto (each decode worker's own setting), always remote, never", metavar="auto|always|never")  # fmt: skip  # noqa: E501
    deterministic: bool = option(
        False, help="use deterministic workers only, and fail over only between equal numerics"
    )
    ttft_objective: float = option(
        0.0, help="seconds to the first token that prefill is ordered by; 0: none", minimum=0
    )
    request_timeout: float = option(600.0, help="seconds a request may take in all", minimum=1)
    drain_timeout: float = option(60.0, help="seconds that running requests have after SIGTERM", minimum=0)
    log_level: str = option("info", help="how much to log", choices=("debug", "info", "warning", "error"))
    log_format: str = option("json", help="log lines", choices=("json", "text"))
    parent_fd: int | None = option(None, help="exit when this pipe closes (local mode)")
