"""`LLMService` and its child `LLMPool`: what a user asks for, validated. One model for local mode, CRD and Helm values.

A field enters with the code that reads it. Keys are camelCase, as Kubernetes has them; unknown keys are refused.
Most fields mean the same on a cluster and in local mode. A field that only one of them reads says so (`_cluster`,
`_local`); the other mode accepts it and names it (`fields_unused`), so nothing is ignored in silence.
A rule across fields stands twice: as CEL for the API server (`CelRule`) and as a validator for everybody else.
Nothing here does I/O: callers hand in the parsed mapping.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, Self, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel

GROUP = "serving.baton.dev"
VERSION = "v1alpha1"
API_VERSION = "serving.baton.dev/v1alpha1"
KIND = "LLMService"
MAX_NAME = 40  # what is left of 63 for names of children: chat-prefill-0a1b2c3d and what Kubernetes appends

_QUANTITY = re.compile(r"^(\d{1,15}(?:\.\d{1,3})?)\s*(Ki|Mi|Gi|Ti|k|M|G|T)?$")
_QUANTITY_FACTORS = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_DURATION_FACTORS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class ResourceError(ValueError):
    """A resource that cannot be used. One line per mistake: field path, value, limit, what to do."""


def parse_quantity(value: object) -> object:
    """Read a Kubernetes quantity (`2Gi`, `500M`, `1048576`) as bytes."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("is not an amount of memory; write for example 512Mi or 2Gi")
    match = _QUANTITY.match(str(value).strip())
    if not match:
        raise ValueError("is not an amount of memory; write for example 512Mi or 2Gi")
    return int(float(match[1]) * _QUANTITY_FACTORS[match[2] or ""])


def parse_duration(value: object) -> object:
    """Read a duration (`500ms`, `2s`, `1m30s`) as seconds. A bare number is refused: its unit would be a guess."""
    text = str(value).strip()
    parts = _DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("is not a duration; write for example 500ms, 2s or 1m30s")
    return sum(float(number) * _DURATION_FACTORS[unit] for number, unit in parts)


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("is not a power of two; use 8, 16 or 32 if unsure")
    return value


def parse_amount(value: object) -> object:
    """Check a quantity of any resource (`500m`, `2`, `4Gi`) and keep it as it is written."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("is not an amount; write for example 500m, 2 or 4Gi")
    if not re.fullmatch(_AMOUNT, str(value)):
        raise ValueError("is not an amount; write for example 500m, 2 or 4Gi")
    return str(value)


_AMOUNT = r"^[0-9]{1,15}([.][0-9]{1,3})?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
_NAME = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
_QUALIFIED = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
_INT_OR_STRING: dict[str, Any] = {"x-kubernetes-int-or-string": True, "maxLength": 20}

Quantity = Annotated[
    int,
    BeforeValidator(parse_quantity),
    Field(gt=0),
    WithJsonSchema(_INT_OR_STRING | {"pattern": r"^[0-9]{1,15}([.][0-9]{1,3})?(k|M|G|T|Ki|Mi|Gi|Ti)?$"}),
]
Amount = Annotated[str, BeforeValidator(parse_amount), WithJsonSchema(_INT_OR_STRING | {"pattern": _AMOUNT})]
Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    Field(gt=0),
    WithJsonSchema({"type": "string", "maxLength": 24, "pattern": r"^([0-9]+([.][0-9]+)?(ms|s|m|h))+$"}),
]
ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=_NAME)]
Label = Annotated[str, Field(max_length=63)]
Labels = Annotated[dict[Annotated[str, Field(max_length=317)], Label], Field(max_length=16)]


class Disaggregation(StrEnum):
    """Whether a prompt may be, must be or never is run by a prefill worker."""

    AUTO = "Auto"
    ALWAYS = "Always"
    NEVER = "Never"


class Transfer(StrEnum):
    """How KV gets from a prefill worker to a decode worker."""

    AUTO = "auto"
    GRPC = "grpc"
    NIXL = "nixl"


class Autoscaling(StrEnum):
    """Who sets the size of a pool that states no replicas. Not `Off`: YAML reads that word as false."""

    FIXED = "Fixed"
    EXTERNAL = "External"


class Strategy(StrEnum):
    """Whether a new revision comes up beside the old one or takes its place."""

    SURGE = "Surge"
    REPLACE = "Replace"


class RedisMode(StrEnum):
    """Where workers announce themselves, besides the headless Services."""

    MANAGED = "Managed"
    EXTERNAL = "External"
    NONE = "None"


@dataclass(frozen=True, slots=True)
class CelRule:
    """A rule that the API server checks. A rule with `oldSelf` is checked on changes only."""

    rule: str
    message: str


class _Part(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)
    cel_rules: ClassVar[tuple[CelRule, ...]] = ()


def _cluster(default: Any = None, **limits: Any) -> Any:
    """A field that only the operator reads."""
    return Field(default=default, json_schema_extra={"x-baton-scope": "cluster"}, **limits)


def _local(default: Any = None, **limits: Any) -> Any:
    """A field that only local mode reads."""
    return Field(default=default, json_schema_extra={"x-baton-scope": "local"}, **limits)


class Metadata(_Part):
    """Labels and annotations are the user's own; nothing reads them."""

    name: str = Field(
        default="baton",
        max_length=MAX_NAME,
        pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$",
        description="the service's name; the names of all its parts begin with it",
    )
    namespace: str = _cluster("default", max_length=63, pattern=_NAME, description="the namespace of all its parts")
    labels: dict[str, str] = Field(default={}, description="yours; Baton reads none")
    annotations: dict[str, str] = Field(default={}, description="yours; Baton reads none")


class Model(_Part):
    source: str = Field(
        default="smollm2",
        min_length=1,
        max_length=512,
        description="smollm2, a Hugging Face id (owner/name[@revision]), a folder or a .gguf file; cannot be changed",
    )
    name: str | None = Field(
        default=None, min_length=1, max_length=253, description="the name that clients send; default: the source's"
    )
    claim_name: ObjectName | None = _cluster(
        description="PersistentVolumeClaim mounted read-only at /models; source is then a path below /models"
    )
    token_secret: ObjectName | None = _cluster(
        description="Secret whose key `token` is the Hugging Face token that the download needs"
    )
    cache_claim_name: ObjectName | None = _cluster(
        description="PersistentVolumeClaim (ReadWriteMany) that keeps downloads; default: each pod downloads anew"
    )
    cel_rules: ClassVar[tuple[CelRule, ...]] = (
        CelRule(
            "self.source == oldSelf.source", "model.source cannot be changed; make another LLMService for another model"
        ),
        CelRule(
            "has(self.claimName) == has(oldSelf.claimName) && "
            "(!has(self.claimName) || self.claimName == oldSelf.claimName)",
            "model.claimName cannot be changed; make another LLMService for another model",
        ),
        CelRule(
            "!has(self.claimName) || self.source.startsWith('/models/')",
            "model.claimName is mounted at /models, so model.source must be a path that begins with /models/",
        ),
    )

    @property
    def is_path(self) -> bool:
        """Whether the source is in the image or on the claim, and nothing is downloaded."""
        return self.source.startswith(("/", ".", "~"))

    @property
    def served_name(self) -> str:
        """The name that clients send: a Hugging Face id or a known name as it is, of a path its last part."""
        last = PurePosixPath(self.source).name.removesuffix(".gguf")
        return self.name or (last if self.is_path and last else self.source)

    @model_validator(mode="after")
    def _check_claim(self) -> Self:
        if self.claim_name is not None and not self.source.startswith("/models/"):
            raise ValueError(
                "model.claimName is mounted at /models, so model.source must be a path that begins with /models/; "
                f"it is {self.source!r}"
            )
        return self


class Resources(_Part):
    requests: Annotated[dict[str, Amount], Field(max_length=8)] = _cluster(
        {}, description="what the scheduler sets aside, by resource; default: memory as in limits, and some CPU"
    )
    limits: Annotated[dict[str, Amount], Field(max_length=8)] = _cluster(
        {}, description="the most a pod may use, by resource; KV memory follows the memory limit unless stated"
    )
    gpus: int = _cluster(0, ge=0, le=16, description="GPUs of each pod; a worker computes on one")
    gpu_resource: str = _cluster(
        "nvidia.com/gpu", max_length=253, pattern=_QUALIFIED, description="the resource that GPUs are asked for by"
    )


class Toleration(_Part):
    key: str | None = _cluster(max_length=317, description="taint key; default: every key")
    operator: Literal["Equal", "Exists"] = _cluster("Equal", description="how value is compared")
    value: Label | None = _cluster(description="taint value; only with Equal")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = _cluster(
        description="taint effect; default: every effect"
    )
    toleration_seconds: int | None = _cluster(ge=0, le=86400, description="how long NoExecute is tolerated")
    cel_rules: ClassVar[tuple[CelRule, ...]] = (
        CelRule(
            "self.operator == 'Equal' ? has(self.key) : !has(self.value)",
            "a toleration with operator Equal needs key, one with Exists takes no value",
        ),
        CelRule(
            "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            "tolerationSeconds needs effect NoExecute",
        ),
    )

    @model_validator(mode="after")
    def _check_operator(self) -> Self:
        if self.key is None if self.operator == "Equal" else self.value is not None:
            raise ValueError("a toleration with operator Equal needs key, one with Exists takes no value")
        if self.toleration_seconds is not None and self.effect != "NoExecute":
            raise ValueError("tolerationSeconds needs effect NoExecute")
        return self


class TopologySpread(_Part):
    """Spreads the pods of one pool; which pods are meant is filled in."""

    topology_key: str = _cluster(
        "topology.kubernetes.io/zone", max_length=317, description="node label that names domains"
    )
    max_skew: int = _cluster(1, ge=1, le=64, description="how far the numbers of pods in two domains may differ")
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = _cluster(
        "ScheduleAnyway", description="whether a pod that cannot be placed so waits"
    )


class PodOverrides(_Part):
    """What may be changed in worker pods besides; everything else of them is Baton's."""

    labels: Labels = _cluster({}, description="more labels; Baton's own win")
    annotations: Annotated[dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=16)] = _cluster(
        {}, description="more annotations"
    )
    env: Annotated[dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=32)] = _cluster(
        {}, description="more environment variables; Baton's own win"
    )
    runtime_class_name: ObjectName | None = _cluster(description="RuntimeClass of the pods")
    scheduler_name: ObjectName | None = _cluster(description="scheduler of the pods; default: the cluster's")


class Pool(_Part):
    replicas: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="how many workers (decode needs at least 1). Left out: 1 or min at first, then as `baton scale`, "
        "`kubectl scale llmpool`, an HPA or KEDA says",
    )
    min: int | None = Field(default=None, ge=0, le=64, description="least workers, and those to begin with; default: 1")
    max: int | None = _cluster(ge=1, le=64, description="most workers; more are asked for in vain; default: 64")
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of each worker; default: an equal share"
    )
    kv_memory: Quantity | None = Field(
        default=None, description="KV memory of each worker; default: an equal share, or what the memory limit leaves"
    )
    resources: Resources = Field(default=Resources(), description="CPU, memory and GPUs of each worker")
    node_selector: Labels = _cluster({}, description="labels that a node must have")
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=16)] = _cluster(
        (), description="taints to tolerate"
    )
    affinity: dict[str, Any] = _cluster({}, description="affinity of the pods, as in a Pod")
    topology_spread_constraints: Annotated[tuple[TopologySpread, ...], Field(max_length=4)] = _cluster(
        (), description="how the pods are spread; default: over zones and nodes where possible"
    )
    priority_class_name: ObjectName | None = _cluster(description="PriorityClass of the pods")
    pod_overrides: PodOverrides = Field(
        default=PodOverrides(), description="what else may be changed in worker pods; all other fields are Baton's"
    )
    cel_rules: ClassVar[tuple[CelRule, ...]] = (
        CelRule(
            "!has(self.replicas) || (!has(self.min) && !has(self.max))",
            "replicas fixes the pool's size; state either replicas or min and max",
        ),
        CelRule("!has(self.max) || (has(self.min) ? self.min : 1) <= self.max", "min is greater than max"),
    )

    @property
    def seed(self) -> int:
        """How many workers there are to begin with."""
        return self.replicas if self.replicas is not None else self.least

    @property
    def least(self) -> int:
        return 1 if self.min is None else self.min

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.replicas is not None and (self.min is not None or self.max is not None):
            raise ValueError("replicas fixes the pool's size; state either replicas or min and max")
        if self.max is not None and self.least > self.max:
            raise ValueError(f"min is greater than max: {self.least} > {self.max}")
        return self


class Pools(_Part):
    prefill: Pool = Field(default=Pool(), description="workers that run prompts and hand their KV over")
    decode: Pool = Field(default=Pool(), description="workers that own requests and write the answers")


class Objectives(_Part):
    ttft: Duration | None = Field(default=None, description="time to first token to aim for; orders the prefill queue")


class HTTPRoute(_Part):
    """Gateway API; made where the cluster has it."""

    parent_name: ObjectName = Field(
        description="the Gateway that the route hangs on", json_schema_extra={"x-baton-scope": "cluster"}
    )
    parent_namespace: ObjectName | None = _cluster(description="the Gateway's namespace; default: the service's")
    section_name: ObjectName | None = _cluster(description="the Gateway's listener; default: every one")
    hostnames: Annotated[tuple[ObjectName, ...], Field(max_length=16)] = _cluster(
        (), description="host names of the route; default: the listener's"
    )
    backend: Literal["Service", "InferencePool"] = _cluster(
        "Service", description="where the route leads; InferencePool: one over the gateway's pods is made too"
    )


class Ingress(_Part):
    host: ObjectName = Field(description="host name of the API", json_schema_extra={"x-baton-scope": "cluster"})
    class_name: ObjectName | None = _cluster(description="IngressClass; default: the cluster's")
    tls_secret: ObjectName | None = _cluster(description="Secret with the certificate; default: plain HTTP")


class Gateway(_Part):
    host: str = _local(
        "127.0.0.1", min_length=1, max_length=253, description="address to listen on; 0.0.0.0: every one"
    )
    port: int = _local(8000, ge=1, le=65535, description="port of the API; the Service of a cluster has 80")
    api_keys_file: str | None = _local(
        max_length=4096, description="file with one accepted API key a line; default: no key needed"
    )
    auth_secret: ObjectName | None = _cluster(
        description="Secret whose key `keys` holds one accepted API key a line; default: no key needed"
    )
    replicas: int = _cluster(1, ge=1, le=64, description="how many gateways")
    resources: Resources = Field(default=Resources(), description="CPU and memory of each gateway")
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = _cluster(
        "ClusterIP", description="how the API's Service is reached"
    )
    http_route: HTTPRoute | None = Field(default=None, description="lead a Gateway API route to the API")
    ingress: Ingress | None = Field(default=None, description="lead an Ingress to the API")
    max_queue_requests: int | None = Field(
        default=None, ge=1, description="requests that may wait for their first token; more get a 503; default: 512"
    )
    max_queue_tokens: int | None = Field(
        default=None, ge=1, description="prompt tokens that may wait for their first token; default: 1,000,000"
    )
    cel_rules: ClassVar[tuple[CelRule, ...]] = (
        CelRule("!has(self.httpRoute) || !has(self.ingress)", "gateway takes httpRoute or ingress, not both"),
    )

    @model_validator(mode="after")
    def _check_entry(self) -> Self:
        if self.http_route is not None and self.ingress is not None:
            raise ValueError("gateway takes httpRoute or ingress, not both")
        return self


class Engine(_Part):
    block_size: (
        Annotated[
            int,
            Field(ge=1, le=256),
            AfterValidator(_power_of_two),
            WithJsonSchema({"type": "integer", "enum": [1, 2, 4, 8, 16, 32, 64, 128, 256]}),
        ]
        | None
    ) = Field(default=None, description="tokens per KV block, a power of two; default: 16")
    max_model_len: int | None = Field(
        default=None, ge=1, description="longest prompt and output together; default: the model's own"
    )
    max_num_seqs: int | None = Field(default=None, ge=1, le=65536, description="sequences in one batch; default: 64")
    max_batched_tokens: int | None = Field(
        default=None, ge=1, description="tokens in one step of a worker; default: the worker's own"
    )
    prefix_caching: bool = Field(default=True, description="keep finished blocks for prompts that begin alike")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="type of weights and KV in memory; default: bfloat16 on a GPU, else float32"
    )
    device: Literal["cpu", "cuda"] | None = Field(
        default=None,
        description="where workers keep weights and KV; default: cuda in a pool that asks for GPUs, else cpu. cuda: "
        "never run on a GPU yet",
    )
    kernels: Literal["native", "triton", "reference"] | None = Field(
        default=None,
        description="who computes; default: native where it can be had. triton (device cpu): a proof, not for speed",
    )


class Image(_Part):
    gateway: str | None = _cluster(
        max_length=512,
        description="image of the gateway, rolled out when the revision that it came with serves; "
        "default: the operator's own release",
    )
    worker: str | None = _cluster(
        max_length=512,
        description="image of the workers, best by digest (name@sha256:...); default: the operator's own release",
    )
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = _cluster(
        "IfNotPresent", description="when images are pulled"
    )
    pull_secrets: Annotated[tuple[ObjectName, ...], Field(max_length=8)] = _cluster(
        (), description="Secrets that pulling images needs"
    )


class Rollout(_Part):
    """How a change that shapes worker pods reaches them."""

    strategy: Strategy = _cluster(
        Strategy.SURGE,
        description="Surge: the new revision comes up whole beside the old one. Replace: in its place, for clusters "
        "with no room for both; a pool of 2 or more keeps one old worker until the new revision serves",
    )
    progress_deadline: Duration = _cluster(
        900.0, description="time that a new revision has to answer a probe; then it is rolled back"
    )


class Redis(_Part):
    mode: RedisMode = _cluster(
        RedisMode.MANAGED,
        description="Managed: a small Redis of the service's own. External: the one of urlSecret. "
        "None: workers are found by DNS",
    )
    url_secret: ObjectName | None = _cluster(
        description="Secret whose key `url` is the whole redis:// or rediss:// URL; with External only"
    )
    cel_rules: ClassVar[tuple[CelRule, ...]] = (
        CelRule(
            "(self.mode == 'External') == has(self.urlSecret)",
            "redis.mode External needs redis.urlSecret, and only that",
        ),
    )

    @model_validator(mode="after")
    def _check_secret(self) -> Self:
        if (self.mode is RedisMode.EXTERNAL) != (self.url_secret is not None):
            raise ValueError("redis.mode External needs redis.urlSecret, and only that")
        return self


_RDMA_OVER_GRPC = "requireRDMA is true, but transfer grpc is TCP; choose transfer nixl or auto"


class LLMServiceSpec(_Part):
    model: Model = Field(default=Model(), description="what is served")
    pools: Pools = Field(default=Pools(), description="the workers")
    disaggregation: Disaggregation = Field(
        default=Disaggregation.AUTO,
        description="Auto: decided per request; Always: by a prefill worker; Never: by the decode worker",
    )
    transfer: Transfer = Field(
        default=Transfer.AUTO,
        description="how KV moves, settled by each pair of workers. auto: NIXL where both have RDMA devices, else "
        "shared memory on one host, else gRPC. grpc, nixl: that and nothing else; without requireRDMA NIXL may use "
        "TCP, which proves no identity",
    )
    require_rdma: bool = Field(
        default=False,
        alias="requireRDMA",
        description="workers refuse to start without RDMA, and KV never goes over TCP; with transfer nixl or auto",
    )
    deterministic: bool = Field(
        default=False, description="same seed, same bytes, whatever else runs and whatever fails"
    )
    objectives: Objectives = Field(default=Objectives(), description="what to aim for")
    autoscaling: Autoscaling = _cluster(
        Autoscaling.EXTERNAL,
        description="External: a pool that states no replicas is scaled by others (kubectl scale, HPA, KEDA). "
        "Fixed: by nobody; it has 1 worker",
    )
    rollout: Rollout = Field(default=Rollout(), description="how a change that shapes worker pods reaches them")
    gateway: Gateway = Field(default=Gateway(), description="the API")
    engine: Engine = Field(default=Engine(), description="how workers run batches and keep KV")
    redis: Redis = Field(
        default=Redis(), description="where workers announce themselves, besides DNS; losing it fails no request"
    )
    image: Image = Field(default=Image(), description="what runs")
    network_policies: bool = _cluster(True, description="let only those reach a pod that need to")
    cel_rules: ClassVar[tuple[CelRule, ...]] = (
        CelRule(
            "(has(self.pools.decode.replicas) ? self.pools.decode.replicas : "
            "has(self.pools.decode.min) ? self.pools.decode.min : 1) >= 1",
            "pools.decode.replicas or min is 0, but a decode worker owns every request; give at least 1",
        ),
        CelRule(
            "self.disaggregation != 'Always' || (has(self.pools.prefill.replicas) ? self.pools.prefill.replicas : "
            "has(self.pools.prefill.min) ? self.pools.prefill.min : 1) >= 1",
            "disaggregation is Always, but pools.prefill.replicas or min is 0; give at least 1 or choose Auto or Never",
        ),
        CelRule("!self.requireRDMA || self.transfer != 'grpc'", _RDMA_OVER_GRPC),
        CelRule(
            "self.autoscaling != 'Fixed' || (!has(self.pools.prefill.min) && !has(self.pools.prefill.max) "
            "&& !has(self.pools.decode.min) && !has(self.pools.decode.max))",
            "autoscaling is Fixed, so state replicas of the pools, not min or max",
        ),
    )

    @property
    def worker_transfer_flags(self) -> tuple[str, ...]:
        """What both kinds of workers are told. Nothing for `auto`: it is their own default."""
        ways = () if self.transfer is Transfer.AUTO else ("--transports", self.transfer.value)
        return (*ways, *(("--require-rdma",) if self.require_rdma else ()))

    @property
    def uses_ucx_ports(self) -> bool:
        """Whether UCX may open TCP ports of its own at the workers."""
        return self.transfer is Transfer.NIXL and not self.require_rdma

    @model_validator(mode="after")
    def _check_pools(self) -> Self:
        stated = "replicas" if self.pools.decode.replicas is not None else "min"
        if self.pools.decode.seed < 1:
            raise ValueError(f"pools.decode.{stated} is 0, but a decode worker owns every request; give at least 1")
        stated = "replicas" if self.pools.prefill.replicas is not None else "min"
        if self.disaggregation is Disaggregation.ALWAYS and self.pools.prefill.seed < 1:
            raise ValueError(
                f"disaggregation is Always, but pools.prefill.{stated} is 0; give at least 1 or choose Auto or Never"
            )
        if self.require_rdma and self.transfer is Transfer.GRPC:
            raise ValueError(_RDMA_OVER_GRPC)
        bounded = [pool for pool in (self.pools.prefill, self.pools.decode) if (pool.min, pool.max) != (None, None)]
        if self.autoscaling is Autoscaling.FIXED and bounded:
            raise ValueError("autoscaling is Fixed, so state replicas of the pools, not min or max")
        return self


class LLMService(_Part):
    api_version: Literal["serving.baton.dev/v1alpha1"] = Field(default=API_VERSION, description="must be stated")
    kind: Literal["LLMService"] = Field(default=KIND, description="must be stated")
    metadata: Metadata = Metadata()
    spec: LLMServiceSpec = Field(default=LLMServiceSpec(), description="what is asked for; every field has a default")
    cel_rules: ClassVar[tuple[CelRule, ...]] = (
        CelRule(
            f"self.metadata.name.size() <= {MAX_NAME} && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            "metadata.name must begin with a letter, hold lower-case letters, digits and '-', "
            f"and at most {MAX_NAME} characters",
        ),
    )


class LLMPoolSpec(_Part):
    """One pool of a service, whatever revision's Deployments stand behind it. Made by the operator."""

    service_name: ObjectName = Field(description="the LLMService that this pool belongs to")
    role: Literal["prefill", "decode"] = Field(description="what its workers do")
    replicas: int | None = Field(
        default=None, ge=0, le=64, description="how many workers; what `kubectl scale`, an HPA or KEDA sets"
    )


def live_service(body: Mapping[str, Any]) -> LLMService:
    """The LLMService in an object of the API server, whose metadata holds much that is not the user's.

    Raises: ResourceError (an object that was accepted under another version of the schema).
    """
    metadata = {key: body["metadata"][key] for key in ("name", "namespace") if key in body["metadata"]}
    given = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": body.get("spec") or {}}
    return parse_llm_service(given, where=f"{metadata.get('namespace', '')}/{metadata['name']}")


def fields_unused(service: LLMService, *, mode: Literal["local", "cluster"]) -> tuple[str, ...]:
    """The paths of the fields that the service states and that mean nothing in this mode."""
    other = "cluster" if mode == "local" else "local"
    return tuple(path for path, scope in _stated_scopes(service, "") if scope == other)


def _stated_scopes(part: BaseModel, path: str) -> Iterator[tuple[str, str]]:
    for name in type(part).model_fields:
        field = type(part).model_fields[name]
        if name not in part.model_fields_set:
            continue
        here, value = f"{path}{field.alias or name}", getattr(part, name)
        scope = scope_of(field.json_schema_extra)
        if isinstance(value, BaseModel):
            yield from _stated_scopes(value, f"{here}.")
        elif scope:
            yield here, scope


def scope_of(extra: object) -> str:
    """`cluster`, `local`, or nothing where both modes read the field."""
    return str(cast("dict[str, object]", extra).get("x-baton-scope", "")) if isinstance(extra, dict) else ""


def parse_llm_service(document: object, *, where: str) -> LLMService:
    """Validate a parsed YAML document; `where` (a file's name) opens every line of an error.

    Raises: ResourceError.
    """
    if not isinstance(document, Mapping):
        raise ResourceError(f"{where}: expected an LLMService (a mapping), found {type(document).__name__}")
    given = cast("Mapping[str, Any]", document)
    missing = [key for key in ("apiVersion", "kind") if key not in given]
    if missing:
        raise ResourceError(
            f"{where}: {' and '.join(missing)} missing; begin with `apiVersion: {API_VERSION}` and `kind: {KIND}`"
        )
    try:
        return LLMService.model_validate(given)
    except ValidationError as error:
        lines = [_explain(dict(mistake)) for mistake in error.errors()]
        raise ResourceError("\n".join(f"{where}: {line}" for line in lines)) from error


def _explain(mistake: dict[str, Any]) -> str:
    """One of pydantic's mistakes as: field path = value, what is wrong, what to do."""
    location = [str(part) for part in mistake["loc"]]
    path = ".".join(location) or "the document"
    value, kind, context = mistake["input"], str(mistake["type"]), cast("dict[str, Any]", mistake.get("ctx", {}))
    if kind == "extra_forbidden":
        return _explain_unknown(location)
    if kind == "value_error":
        reason = str(context.get("error", mistake["msg"]))
        return f"{path}: {reason}" if isinstance(value, BaseModel | dict) else f"{path} = {value!r} {reason}"
    if kind == "model_type":
        return f"{path} = {value!r} is not a mapping; its keys: {', '.join(_known_keys(location))}"
    if kind == "greater_than_equal":
        return f"{path} = {value!r} is too small; give at least {context['ge']}"
    if kind == "greater_than":
        return f"{path} = {value!r} is too small; give more than {context['gt']}"
    if kind == "less_than_equal":
        return f"{path} = {value!r} is too large; give at most {context['le']}"
    if kind in ("literal_error", "enum"):
        return f"{path} = {value!r} is not known; use {context['expected']}"
    if kind == "string_pattern_mismatch":
        return f"{path} = {value!r} is not a name; use lower-case letters, digits and '-' (inside only)"
    if kind == "string_too_long":
        return f"{path} = {value!r} is too long; use at most {context['max_length']} characters"
    return f"{path} = {value!r}: {str(mistake['msg']).lower()}"


def _explain_unknown(location: list[str]) -> str:
    known = _known_keys(location[:-1])
    close = difflib.get_close_matches(location[-1], known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    parent = ".".join(location[:-1]) or "the document"
    return f"{'.'.join(location)}: unknown key; {hint}known keys of {parent}: {', '.join(known)}"


def _known_keys(location: list[str]) -> list[str]:
    part: type[BaseModel] = LLMService
    for key in location:
        if not key.isdigit():  # an index into a list of the part that was found before it
            field = next(field for name, field in part.model_fields.items() if (field.alias or name) == key)
            part = next(found for found in parts_of(field.annotation))
    return sorted(field.alias or name for name, field in part.model_fields.items())


def parts_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The part in an annotation: itself, or what `X | None` or a list of it holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from parts_of(inner)
