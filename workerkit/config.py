"""Settings that prefill and decode workers share. Each service adds its own fields to this dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.dispatch import Device, Dtype, Kernels
from kvtransfer.auth import Secret
from kvtransfer.negotiation import AUTO, NIXL, WAYS, check_ways
from registry.config import RegistryConfig
from registry.entry import is_revision, is_worker_id
from registry.keeper import LEASE_S
from servicekit.config import ConfigError, one_of_or_auto, option, parse_address, parse_bytes, power_of_two
from servicekit.lifecycle import read_secret

STAGED, DIRECT = "staged", "direct"


def bytes_or_auto(text: str) -> int | None:
    return None if text == "auto" else parse_bytes(text)


def _worker_id(value: str) -> str | None:
    return None if is_worker_id(value) else "must be at most 253 letters, digits, '-', '_' and '.'"


def _revision(value: str) -> str | None:
    return None if is_revision(value) else "must be at most 63 letters, digits, '-', '_' and '.'"


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(RegistryConfig):
    """One worker process, from `servicekit.config.load`. Validated when built."""

    # what is served
    model: Path = option(help="model folder or .gguf file")
    model_id: str = option("", help="name that clients use; empty: the file's name")
    dtype: Dtype | None = option(
        None,
        help="type of the weights in memory, and on a GPU of KV; auto: bfloat16 on a GPU, else float32",
        parse=one_of_or_auto(Dtype),
        metavar="auto|float32|bfloat16",
    )
    kernels: Kernels | None = option(
        None,
        help="who computes; triton on the CPU: in Triton's interpreter, a proof and not for speed",
        parse=one_of_or_auto(Kernels),
        metavar="auto|native|triton|reference",
    )
    device: Device | None = option(
        None,
        help="where weights and KV are; auto: cpu; cuda was never run on a GPU yet",
        parse=one_of_or_auto(Device),
        metavar="auto|cpu|cuda",
    )
    deterministic: bool = option(False, help="same bits whatever the batch, the chunks and the P/D split")
    max_model_len: int = option(0, help="longest prompt and output together; 0: the model's own", minimum=0)

    revision: str = option(
        "", help="revision of the service that this worker is of; P and D pair within one", check=_revision
    )

    # where
    worker_id: str = option(help="name of this worker, unique in its service", check=_worker_id)
    listen: tuple[str, int] = option(
        ("127.0.0.1", 0), help="gRPC address; port 0: any", parse=parse_address, metavar="HOST:PORT"
    )
    http: tuple[str, int] = option(
        ("127.0.0.1", 0), help="address of health and metrics; port 0: any", parse=parse_address, metavar="HOST:PORT"
    )
    advertise: str = option("", help="host that others reach this worker by; empty: that of --listen")
    registry_lease_s: float = option(
        LEASE_S, help="the registry forgets this worker so long after its last announcement", minimum=1, maximum=3600
    )
    secret_file: Path = option(help="file with the service's secret; only callers that prove it are served")
    parent_fd: int | None = option(None, help="exit when this pipe closes", minimum=0)

    # how much
    threads: int = option(0, help="threads of the runner; 0: what this process may use", minimum=0, maximum=1024)
    kv_memory: int | None = option(
        None, help="bytes of KV memory, or auto", parse=bytes_or_auto, metavar="BYTES|auto", minimum=1
    )
    gpu_memory_fraction: float = option(
        0.0, help="share of the GPU's memory for this worker; 0: 0.9 divided by --workers-on-host", minimum=0, maximum=1
    )
    staging_memory: int | None = option(
        None,
        help="bytes of host memory that KV passes through from and to a GPU's memory, or auto",
        parse=bytes_or_auto,
        metavar="BYTES|auto",
        minimum=1,
    )
    gpu_transfer: str = option(
        STAGED,
        help="how KV in a GPU's memory moves: through host memory, or read by nixl where it lies; equal at P and D",
        choices=(STAGED, DIRECT),
    )
    workers_on_host: int = option(1, help="workers that share this host's memory and cores", minimum=1, maximum=1024)
    block_size: int = option(16, help="tokens per KV block", minimum=1, maximum=1024, check=power_of_two)
    max_num_seqs: int = option(64, help="sequences in one batch", minimum=1, maximum=65536)
    max_num_batched_tokens: int = option(512, help="tokens in one batch", minimum=1, maximum=1 << 20)
    max_num_requests: int = option(1024, help="requests taken at once; more are refused", minimum=1, maximum=1 << 20)
    prefix_caching: bool = option(True, help="keep finished blocks for prompts that begin alike")
    transports: tuple[str, ...] = option(
        (AUTO,), help="ways to move KV, best first; auto: nixl over RDMA, else shm, else grpc", choices=WAYS
    )
    require_rdma: bool = option(False, help="refuse to start unless NIXL can use RDMA; KV never goes over TCP")

    # the end, and the logs
    drain_s: float = option(30.0, help="longest a drain waits for running requests", minimum=0, maximum=3600)
    log_level: str = option("info", help="least level logged", choices=("debug", "info", "warning", "error"))
    log_format: str = option("json", help="shape of log lines", choices=("json", "text"))
    failpoints: tuple[str, ...] = option((), help="chaos tests only: faults on demand, name=k,...")

    def __post_init__(self) -> None:
        if wrong := check_ways(self.transports, self.require_rdma):
            raise ConfigError(wrong)
        if self.gpu_transfer == DIRECT and (self.device is not Device.CUDA or self.transports != (NIXL,)):
            device, ways = self.device or "auto", ",".join(self.transports)
            raise ConfigError(f"gpu_transfer = direct needs device cuda and transports nixl, not {device} and {ways}")

    @property
    def served_model_id(self) -> str:
        return self.model_id or self.model.stem

    def load_secret(self) -> Secret:
        """Raises: ValueError, OSError."""
        return Secret(read_secret(self.secret_file))
