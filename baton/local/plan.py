"""Decide which processes run an LLMService on this machine, and with how much of it. Pure: no I/O, no clock.

CPU: what the cgroup grants, divided equally among the workers. Memory: three quarters of the limit, less the gateway,
the weights (one file that all workers map; engine/loading) and each worker's runtime, is left for KV. Half of that is
divided equally (at most DEFAULT_KV_BYTES each); the other half stays free for `baton scale`. A worker whose pool states
`kvMemory` has that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from baton.local.errors import PlanError

if TYPE_CHECKING:
    from baton_operator.resources import LLMService, Pool  # 0.2 s of pydantic that `baton ps` and `baton doctor` spare

MIB = 2**20
USABLE_SHARE = 0.75  # the rest is everybody else's
GATEWAY_BYTES = 300 * MIB
WORKER_RUNTIME_BYTES = 600 * MIB  # Python, torch and activations
DEFAULT_KV_BYTES = 2048 * MIB
MIN_KV_BYTES = 32 * MIB
MAX_BLOCK_SIZE = 256  # tokens; the largest spec.engine.blockSize
DRAIN_S = 30  # what running requests have to finish when a process is stopped


class Role(Enum):
    GATEWAY = "gateway"
    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def module(self) -> str:
        return "gateway" if self is Role.GATEWAY else f"{self.value}_service"


POOL_ROLES = (Role.PREFILL, Role.DECODE)


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process may use; `source` says where the numbers were read."""

    cpus: float
    memory_bytes: int
    source: str = "given"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What planning needs to know of the model on disk."""

    path: Path
    model_id: str
    weight_bytes: int
    kv_bytes_per_token: int
    max_model_len: int = 0  # of prompt and output together, as the model itself says; 0: not known


@dataclass(frozen=True, slots=True)
class RunPaths:
    """Where the processes of one run find each other."""

    registry_dir: Path
    secret_file: Path


@dataclass(frozen=True, slots=True)
class WorkerShare:
    threads: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process: `python -m <module> <arguments>`. Flags that only the running supervisor knows are added by it."""

    worker_id: str
    role: Role
    module: str
    arguments: tuple[str, ...]
    share: WorkerShare | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The processes in order of their start, and the arithmetic in words."""

    processes: tuple[ProcessSpec, ...]
    arithmetic: tuple[str, ...]


def plan_service(service: LLMService, machine: Machine, model: ModelFacts, paths: RunPaths) -> Plan:
    """All processes of a service.

    Raises: PlanError where the machine is too small, naming the field that would help.
    """
    replicas = {role: pool_of(service, role).seed for role in POOL_ROLES}
    shares, arithmetic = divide_machine(service, machine, model, replicas)
    workers = [
        worker_spec(service, model, paths, role, index, shares[role])
        for role in POOL_ROLES
        for index in range(replicas[role])
    ]
    return Plan((gateway_spec(service, model, paths), *workers), arithmetic)


def plan_added_worker(
    service: LLMService,
    machine: Machine,
    model: ModelFacts,
    paths: RunPaths,
    role: Role,
    index: int,
    running: tuple[ProcessSpec, ...],
) -> ProcessSpec:
    """One more worker beside those that run, with the share of a service that had it from the start, if that is left.

    Running workers keep what they have; moving memory between live workers is not worth a restart.
    Raises: PlanError.
    """
    workers = [spec for spec in running if spec.share is not None]
    replicas = {kind: sum(spec.role is kind for spec in workers) + (kind is role) for kind in POOL_ROLES}
    shares, _ = divide_machine(service, machine, model, replicas, pool_limits=False)
    held = sum(spec.share.kv_bytes for spec in workers if spec.share is not None)
    left = _kv_budget(machine, model, len(workers) + 1) - held
    wanted = shares[role]
    stated = pool_of(service, role).kv_memory
    needed = stated or _least_kv(service, model)
    if left < needed:
        raise PlanError(
            f"no memory for {role.value}-{index}: {_mib(max(left, 0))} of KV are left, {_mib(needed)} "
            f"are needed; set a smaller spec.pools.*.kvMemory (running workers hold {_mib(held)}) and start again"
        )
    return worker_spec(
        service, model, paths, role, index, WorkerShare(wanted.threads, stated or min(wanted.kv_bytes, left))
    )


def divide_machine(
    service: LLMService,
    machine: Machine,
    model: ModelFacts,
    replicas: Mapping[Role, int],
    *,
    pool_limits: bool = True,
) -> tuple[dict[Role, WorkerShare], tuple[str, ...]]:
    """Threads and KV bytes of each worker of both pools, and how they came about.

    Raises: PlanError if what the service states, or the smallest useful share, does not fit (`pool_limits`).
    """
    num_workers = sum(replicas.values())
    _check_stated_kv(service, model, replicas)
    threads, threads_words = _divide_threads(service, machine, replicas)
    budget = _kv_budget(machine, model, num_workers)
    stated = {role: pool_of(service, role).kv_memory for role in POOL_ROLES}
    held = sum((stated[role] or 0) * replicas[role] for role in POOL_ROLES)
    num_open = sum(replicas[role] for role in POOL_ROLES if stated[role] is None)
    whole = (budget - held) // num_open // MIB * MIB if num_open else 0
    least = _least_kv(service, model)
    share = max(min(DEFAULT_KV_BYTES, whole // 2 // MIB * MIB), min(whole, least))
    if pool_limits and held and budget < held:
        raise PlanError(
            f"spec.pools.*.kvMemory asks for {_mib(held)} in all, but {_mib(max(budget, 0))} are left for KV "
            f"({_budget_words(machine, model, num_workers)}); ask for less or run fewer replicas"
        )
    if pool_limits and num_open and share < least:
        raise PlanError(
            f"{_mib(max(share, 0))} of KV memory would be left for each worker, {_mib(least)} are the least "
            f"({_budget_words(machine, model, num_workers)}); run fewer spec.pools.*.replicas, "
            "state a smaller spec.engine.maxModelLen or take a smaller model"
        )
    shares = {role: WorkerShare(threads[role], stated[role] or max(share, least)) for role in POOL_ROLES}
    per_role = ", ".join(
        f"{role.value} {_mib(shares[role].kv_bytes)} = {shares[role].kv_bytes // model.kv_bytes_per_token} tokens"
        for role in POOL_ROLES
        if replicas[role]
    )
    return shares, (
        f"threads: {threads_words}",
        f"memory: {_budget_words(machine, model, num_workers)} leaves {_mib(budget)} for KV; each worker: {per_role}",
    )


def gateway_spec(service: LLMService, model: ModelFacts, paths: RunPaths) -> ProcessSpec:
    spec = service.spec
    arguments = [
        *_common_arguments(model, paths),
        "--http", f"{spec.gateway.host}:{spec.gateway.port}",
        "--internal-http", "127.0.0.1:0",
        "--disaggregation", spec.disaggregation.value.lower(),
        "--drain-timeout", str(DRAIN_S),
    ]  # fmt: skip
    arguments += _stated("--max-model-len", spec.engine.max_model_len)
    arguments += _stated("--api-key-file", spec.gateway.api_keys_file)
    arguments += _stated("--max-queue-requests", spec.gateway.max_queue_requests)
    arguments += _stated("--max-queue-tokens", spec.gateway.max_queue_tokens)
    arguments += _stated("--ttft-objective", spec.objectives.ttft)
    arguments += ["--deterministic"] if spec.deterministic else []
    return ProcessSpec("gateway", Role.GATEWAY, Role.GATEWAY.module, tuple(arguments))


def worker_spec(
    service: LLMService, model: ModelFacts, paths: RunPaths, role: Role, index: int, share: WorkerShare
) -> ProcessSpec:
    spec = service.spec
    worker_id = f"{role.value}-{index}"
    arguments = [
        *_common_arguments(model, paths),
        "--worker-id", worker_id,
        "--listen", "127.0.0.1:0",
        "--threads", str(share.threads),
        "--kv-memory", str(share.kv_bytes),
        "--drain-s", str(DRAIN_S),
        "--prefix-caching" if spec.engine.prefix_caching else "--no-prefix-caching",
    ]  # fmt: skip
    arguments += _stated("--dtype", spec.engine.dtype)
    arguments += _stated("--device", spec.engine.device)
    arguments += _stated("--kernels", spec.engine.kernels)
    arguments += _stated("--block-size", spec.engine.block_size)
    arguments += _stated("--max-model-len", spec.engine.max_model_len)
    arguments += _stated("--max-num-seqs", spec.engine.max_num_seqs)
    arguments += _stated("--max-num-batched-tokens", spec.engine.max_batched_tokens)
    arguments += ["--deterministic"] if spec.deterministic else []
    arguments += spec.worker_transfer_flags
    if role is Role.DECODE:
        arguments += ["--disaggregation", spec.disaggregation.value.lower()]
    return ProcessSpec(worker_id, role, role.module, tuple(arguments), share)


def pool_of(service: LLMService, role: Role) -> Pool:
    return service.spec.pools.prefill if role is Role.PREFILL else service.spec.pools.decode


# ---------------------------------------------------------------- parts


def _common_arguments(model: ModelFacts, paths: RunPaths) -> list[str]:
    return [
        "--model", str(model.path),
        "--model-id", model.model_id,
        "--secret-file", str(paths.secret_file),
        "--registry-dir", str(paths.registry_dir),
        "--log-format", "text",  # `baton logs` is read by people
    ]  # fmt: skip


def _stated(flag: str, value: object) -> list[str]:
    """The flag if the service states a value: what it leaves open is the process's own default."""
    return [] if value is None else [flag, str(value)]


def _divide_threads(service: LLMService, machine: Machine, replicas: Mapping[Role, int]) -> tuple[dict[Role, int], str]:
    stated = {role: pool_of(service, role).threads for role in POOL_ROLES}
    held = sum((stated[role] or 0) * replicas[role] for role in POOL_ROLES)
    num_open = sum(replicas[role] for role in POOL_ROLES if stated[role] is None)
    share = max(1, int(machine.cpus - held) // num_open) if num_open else 0
    threads = {role: stated[role] or max(share, 1) for role in POOL_ROLES}
    words = f"{machine.cpus:g} CPUs ({machine.source})"
    if held:
        words += f" less {held} that the service states"
    if num_open:
        words += f", divided among {num_open} worker{'s' if num_open > 1 else ''}: {share} each"
    return threads, words


def _check_stated_kv(service: LLMService, model: ModelFacts, replicas: Mapping[Role, int]) -> None:
    """Say now, in the words of the service's file, what a worker would refuse. Raises: PlanError."""
    max_model_len = service.spec.engine.max_model_len or model.max_model_len
    block_size = service.spec.engine.block_size or 1  # the worker's own is not known here: it may need a little more
    least = -(-max_model_len // block_size) * block_size * model.kv_bytes_per_token
    num_mib = -(-least // MIB)
    for role in POOL_ROLES:
        stated = pool_of(service, role).kv_memory
        if replicas[role] and stated is not None and stated < least:
            raise PlanError(
                f"spec.pools.{role.value}.kvMemory = {_mib(stated)} holds {stated // model.kv_bytes_per_token} tokens, "
                f"but a request may have {max_model_len}, which need {num_mib} MiB; give at least {num_mib}Mi or "
                f"state a smaller spec.engine.maxModelLen"
            )


def _least_kv(service: LLMService, model: ModelFacts) -> int:
    """One sequence of the greatest length must fit, or the worker refuses to start. In whole MiB, at least the minimum.

    A block more than the tokens need: the length is rounded up to whole blocks.
    """
    num_tokens = (service.spec.engine.max_model_len or model.max_model_len) + MAX_BLOCK_SIZE
    return max(MIN_KV_BYTES, -(-num_tokens * model.kv_bytes_per_token // MIB) * MIB)


def _kv_budget(machine: Machine, model: ModelFacts, num_workers: int) -> int:
    usable = int(machine.memory_bytes * USABLE_SHARE)
    return usable - GATEWAY_BYTES - model.weight_bytes - num_workers * WORKER_RUNTIME_BYTES


def _budget_words(machine: Machine, model: ModelFacts, num_workers: int) -> str:
    return (
        f"{USABLE_SHARE:.0%} of {_mib(machine.memory_bytes)} less {_mib(GATEWAY_BYTES)} for the gateway, "
        f"{_mib(model.weight_bytes)} for weights that all workers share and "
        f"{num_workers} x {_mib(WORKER_RUNTIME_BYTES)} runtime"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.0f} MiB"
