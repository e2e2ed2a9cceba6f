"""What an LLMService should consist of: service + platform -> manifests. Pure; how they come about is plan.py's part.

    ServiceAccounts, NetworkPolicies                who may reach whom
    <name>-prefill, <name>-decode                   headless Services: discovery without Redis
    <name>-redis                                    a small Redis, if managed
    <name>                                          Service of the API; <name>-gateway: headless, the internal port
    LLMPools, <name>-routing, <name>-<role>-<rev>   sizes, the serving revision, worker Deployments
    <name>-gateway                                  gateway Deployment
    PDBs, ServiceMonitor, HTTPRoute, Ingress ...    what needs the rest

Manifests state neither replicas of workers nor empty maps, and are never changed by the one who gets them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from baton_operator import objects
from baton_operator.objects import (
    API_PORT,
    COMPONENT_LABEL,
    DRAIN_S,
    GRPC_PORT,
    HEALTH_PORT,
    INTERNAL_PORT,
    PROBER_LABEL,
    REDIS_PORT,
    REVISION_LABEL,
    ROLES,
    SERVICE_LABEL,
    UCX_PORTS,
    Desired,
    DesiredPool,
    Manifest,
    RandomSecret,
)
from baton_operator.resources import (
    Autoscaling,
    Disaggregation,
    LLMService,
    Pool,
    RedisMode,
    Resources,
    Strategy,
    fields_unused,
)

Object: TypeAlias = dict[str, Any]

USER = 65532  # of our images
MOST_WORKERS = 64  # of a pool that states no maximum
CACHE = "/var/cache/baton"
LINK = "/tmp/model"  # a volume of the pod's own; the init container links what it fetched here
MODELS = "/models"
SECRETS = "/etc/baton"
SERVICE_MONITOR = "monitoring.coreos.com/v1/ServiceMonitor"
HTTP_ROUTE = "gateway.networking.k8s.io/v1/HTTPRoute"
INFERENCE_POOL = "inference.networking.k8s.io/v1/InferencePool"

ALL_APIS = frozenset([SERVICE_MONITOR, HTTP_ROUTE, INFERENCE_POOL])

_WORKER_DEFAULTS = {"cpu": "500m", "memory": "2Gi"}
_GATEWAY_DEFAULTS = {"cpu": "100m", "memory": "512Mi"}
_REDIS_DEFAULTS = {"cpu": "50m", "memory": "96Mi"}


@dataclass(frozen=True, slots=True)
class Platform:
    """What the operator was told at its start and what the cluster has; the rest is the service's own."""

    gateway_image: str = "baton-gateway:latest"
    worker_image: str = "baton-worker:latest"
    gpu_worker_image: str = "baton-worker-cuda:latest"
    redis_image: str = "baton-redis:latest"
    operator_namespace: str = "baton-system"
    apis: frozenset[str] = frozenset()
    """Optional kinds that the cluster has: of ALL_APIS."""


def desire(service: LLMService, platform: Platform, *, uid: str, generation: int) -> Desired:
    """Everything of one service, with its revision."""
    make = _Maker(service, platform, uid)
    spec = service.spec
    templates = {role: make.worker_template(role) for role in ROLES}
    revision = revision_of(templates)
    return Desired(
        namespace=make.namespace,
        name=make.name,
        uid=uid,
        generation=generation,
        revision=revision,
        model=spec.model.served_name,
        url=f"http://{make.name}.{make.namespace}.svc",
        mode=spec.disaggregation.value,
        replaces=spec.rollout.strategy is Strategy.REPLACE,
        progress_deadline_s=spec.rollout.progress_deadline,
        secrets=tuple(make.secrets()),
        before=(*make.accounts(), *make.network_policies(), *make.services(), *make.redis()),
        pools={role: make.pool(role, templates[role], revision) for role in ROLES},
        routing=make.named("v1", "ConfigMap", "routing", "gateway"),
        gateway=make.gateway(),
        after=(*make.disruption_budgets(), *make.service_monitor(), *make.entries()),
        warnings=tuple(make.warnings()),
    )


def revision_of(templates: Mapping[str, Manifest]) -> str:
    """One name for everything that shapes the worker pods of both pools; replicas do not."""
    canonical = json.dumps(templates, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


class _Maker:
    """The manifests of one service."""

    def __init__(self, service: LLMService, platform: Platform, uid: str) -> None:
        self.service = service
        self.spec = service.spec
        self.platform = platform
        self.name = service.metadata.name
        self.namespace = service.metadata.namespace
        self.uid = uid

    # ------------------------------------------------------------ workers

    def pool(self, role: str, template: Manifest, revision: str) -> DesiredPool:
        pool = self._pool_spec(role)
        is_fixed = pool.replicas is not None or self.spec.autoscaling is Autoscaling.FIXED
        return DesiredPool(
            role=role,
            pool=self.named(objects.API_VERSION, objects.POOL_KIND, role, role)
            | {"spec": {"serviceName": self.name, "role": role}},
            deployment=self._worker_deployment(role, template, revision),
            replicas=pool.seed if is_fixed else None,
            seed=pool.seed,
            least=pool.seed if is_fixed else pool.least,
            most=pool.seed if is_fixed else pool.max or MOST_WORKERS,
        )

    def worker_template(self, role: str) -> Manifest:
        """A worker pod but for its revision."""
        pool, overrides = self._pool_spec(role), self._pool_spec(role).pod_overrides
        container: Object = self._container(role, self._worker_image(pool)) | {
            "command": ["python", "-m", f"{role}_service"],
            "args": self._worker_arguments(role, pool),
            "ports": [_port("grpc", GRPC_PORT), _port("health", HEALTH_PORT)],
            "resources": _resources(pool.resources, _WORKER_DEFAULTS),
            **_probes(HEALTH_PORT),
        }
        if self.spec.uses_ucx_ports:  # the only ones that the network policy leaves open
            container["env"].append({"name": "UCX_TCP_PORT_RANGE", "value": "{}-{}".format(*UCX_PORTS)})
        container["env"] = _merged_env(overrides.env, container["env"])
        pod = self._pod("worker", container, init=self._fetches(container["image"]))
        pod |= _present(
            nodeSelector=dict(pool.node_selector),
            tolerations=[_dump(toleration) for toleration in pool.tolerations],
            affinity=pool.affinity,
            priorityClassName=pool.priority_class_name,
            runtimeClassName=overrides.runtime_class_name,
            schedulerName=overrides.scheduler_name,
        )
        pod["topologySpreadConstraints"] = self._spread(role, pool)
        labels = {**overrides.labels, **self.labels(role)}
        return {"metadata": {"labels": labels, **_present(annotations=dict(overrides.annotations))}, "spec": pod}

    def _worker_deployment(self, role: str, template: Manifest, revision: str) -> Manifest:
        labels = {**self.selector(role), REVISION_LABEL: revision}
        spec: Object = dict(template["spec"])
        (container,) = spec["containers"]
        spec["containers"] = [{**container, "args": [*container["args"], "--revision", revision]}]
        manifest = self.named("apps/v1", "Deployment", f"{role}-{revision}", role)
        manifest["metadata"]["labels"][REVISION_LABEL] = revision
        metadata = {**template["metadata"], "labels": {**template["metadata"]["labels"], **labels}}
        manifest["spec"] = {
            "selector": {"matchLabels": labels},
            "revisionHistoryLimit": 1,
            "template": {"metadata": metadata, "spec": spec},
        }
        return manifest

    def _worker_arguments(self, role: str, pool: Pool) -> list[str]:
        engine = self.spec.engine
        return [
            *self._model_arguments(),
            "--worker-id", "$(POD_NAME)",
            "--listen", f"0.0.0.0:{GRPC_PORT}",
            "--http", f"0.0.0.0:{HEALTH_PORT}",
            "--advertise", "$(POD_IP)",
            *self._registry_arguments(),
            "--kv-memory", str(pool.kv_memory or "auto"),
            "--drain-s", str(DRAIN_S),
            "--prefix-caching" if engine.prefix_caching else "--no-prefix-caching",
            *_stated("--dtype", engine.dtype),
            *_stated("--device", self._device(pool)),
            *_stated("--kernels", engine.kernels),
            *_stated("--threads", pool.threads),
            *_stated("--block-size", engine.block_size),
            *_stated("--max-model-len", engine.max_model_len),
            *_stated("--max-num-seqs", engine.max_num_seqs),
            *_stated("--max-num-batched-tokens", engine.max_batched_tokens),
            *(["--deterministic"] if self.spec.deterministic else []),
            *(["--disaggregation", self.spec.disaggregation.lower()] if role == "decode" else []),
            *self.spec.worker_transfer_flags,
        ]  # fmt: skip

    def _device(self, pool: Pool) -> str | None:
        engine = self.spec.engine
        may_use_gpu = engine.kernels in (None, "triton")  # others run on the CPU alone
        return engine.device or ("cuda" if pool.resources.gpus and may_use_gpu else None)

    def _worker_image(self, pool: Pool) -> str:
        default = self.platform.gpu_worker_image if pool.resources.gpus else self.platform.worker_image
        return self.spec.image.worker or default

    def _spread(self, role: str, pool: Pool) -> list[Object]:
        stated: list[Object] = [_dump(spread) for spread in pool.topology_spread_constraints]
        evenly = {"maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway"}
        keys = ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
        chosen = stated or [evenly | {"topologyKey": key} for key in keys]
        return [spread | {"labelSelector": {"matchLabels": self.selector(role)}} for spread in chosen]

    # ------------------------------------------------------------ gateway

    def gateway(self) -> Manifest:
        gateway = self.spec.gateway
        container: Object = self._container("gateway", self.spec.image.gateway or self.platform.gateway_image) | {
            "command": ["python", "-m", "gateway"],
            "args": self._gateway_arguments(),
            "ports": [_port("http", API_PORT), _port("internal", INTERNAL_PORT)],
            "resources": _resources(gateway.resources, _GATEWAY_DEFAULTS),
            **_probes(API_PORT),
        }
        pod = self._pod("gateway", container, init=self._fetches(container["image"], "--only", "tokenizer"))
        routing: Object = {"name": f"{self.name}-routing", "items": [{"key": "routing.json", "path": "routing.json"}]}
        self._mount(pod, "routing", "routing", {"configMap": routing | {"optional": True}})
        if gateway.auth_secret:
            self._mount(pod, "keys", "keys", {"secret": {"secretName": gateway.auth_secret, "defaultMode": 0o440}})
        return self.named("apps/v1", "Deployment", "gateway", "gateway") | {
            "spec": {
                "replicas": gateway.replicas,
                "selector": {"matchLabels": self.selector("gateway")},
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
                "revisionHistoryLimit": 1,
                "template": {"metadata": {"labels": self.labels("gateway")}, "spec": pod},
            }
        }

    def _gateway_arguments(self) -> list[str]:
        gateway = self.spec.gateway
        pools = ",".join(f"{self.name}-{role}.{self.namespace}.svc:{GRPC_PORT}" for role in ROLES)
        return [
            *self._model_arguments(),
            "--gateway-id", "$(POD_NAME)",
            "--http", f"0.0.0.0:{API_PORT}",
            "--internal-http", f"0.0.0.0:{INTERNAL_PORT}",
            *self._registry_arguments(),
            "--registry-dns", pools,
            "--routing-file", f"{SECRETS}/routing/routing.json",
            "--disaggregation", self.spec.disaggregation.lower(),
            "--drain-timeout", str(DRAIN_S),
            *_stated("--max-model-len", self.spec.engine.max_model_len),
            *_stated("--api-key-file", f"{SECRETS}/keys/keys" if gateway.auth_secret else None),
            *_stated("--max-queue-requests", gateway.max_queue_requests),
            *_stated("--max-queue-tokens", gateway.max_queue_tokens),
            *_stated("--ttft-objective", self.spec.objectives.ttft),
            *(["--deterministic"] if self.spec.deterministic else []),
        ]  # fmt: skip

    # ------------------------------------------------------------ what pods share

    def _pod(self, account: str, container: Object, *, init: list[Object]) -> Object:
        """A pod of the level `restricted` that writes to /tmp and the cache alone."""
        model, redis = self.spec.model, self.spec.redis
        cache = {"persistentVolumeClaim": {"claimName": model.cache_claim_name}} if model.cache_claim_name else None
        pod = _restricted_pod(container)
        pod |= {"serviceAccountName": f"{self.name}-{account}", "terminationGracePeriodSeconds": DRAIN_S + 15}
        pod |= _present(
            initContainers=init,
            imagePullSecrets=[{"name": name} for name in self.spec.image.pull_secrets],
        )
        pod["volumes"].append({"name": "cache", **(cache or {"emptyDir": {}})})
        self._mount(pod, "internal", "internal", _secret_volume(f"{self.name}-internal"))
        if redis.mode is RedisMode.MANAGED:
            self._mount(pod, "redis", "redis", _secret_volume(f"{self.name}-redis"))
        elif redis.url_secret:
            self._mount(pod, "redis", "redis", _secret_volume(redis.url_secret))
        if model.claim_name:
            claim = {"claimName": model.claim_name, "readOnly": True}
            pod["volumes"].append({"name": "models", "persistentVolumeClaim": claim})
            container["volumeMounts"].append({"name": "models", "mountPath": MODELS, "readOnly": True})
        return pod

    def _mount(self, pod: Object, name: str, folder: str, volume: Object) -> None:
        """A read-only volume of the main container below /etc/baton."""
        pod["volumes"].append({"name": name, **volume})
        mount = {"name": name, "mountPath": f"{SECRETS}/{folder}", "readOnly": True}
        pod["containers"][0]["volumeMounts"].append(mount)

    def _container(self, name: str, image: str) -> Object:
        return _restricted_container(name, image, self.spec.image.pull_policy) | {
            "env": [
                {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                *_CACHE_ENV,
            ],
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "cache", "mountPath": CACHE}],
        }

    def _fetches(self, image: str, *options: str) -> list[Object]:
        """The init container that fetches the model, where it is not in the image or on a claim."""
        model = self.spec.model
        if model.is_path:
            return []
        token: Object = {"secretKeyRef": {"name": model.token_secret, "key": "token"}}
        fetch = self._container("model", image) | {
            "command": ["python", "-m", "baton", "pull", model.source, "--link", LINK, *options],
            "env": [*_CACHE_ENV, *([{"name": "HF_TOKEN", "valueFrom": token}] if model.token_secret else [])],
            "resources": _resources(Resources(), _GATEWAY_DEFAULTS),
        }
        return [fetch]

    def _model_arguments(self) -> list[str]:
        model = self.spec.model
        path = model.source if model.is_path else LINK
        return ["--model", path, "--model-id", model.served_name, "--secret-file", f"{SECRETS}/internal/secret"]

    def _registry_arguments(self) -> list[str]:
        prefix = ["--registry-prefix", f"baton:{self.namespace}:{self.name}"]
        match self.spec.redis.mode:
            case RedisMode.MANAGED:
                url = f"redis://{self.name}-redis.{self.namespace}.svc:{REDIS_PORT}"
                return ["--registry", url, "--registry-password-file", f"{SECRETS}/redis/password", *prefix]
            case RedisMode.EXTERNAL:
                return ["--registry-file", f"{SECRETS}/redis/url", *prefix]
            case RedisMode.NONE:
                return []

    def _pool_spec(self, role: str) -> Pool:
        return self.spec.pools.prefill if role == "prefill" else self.spec.pools.decode

    # ------------------------------------------------------------ what is around them

    def secrets(self) -> Iterator[RandomSecret]:
        yield RandomSecret(self.named("v1", "Secret", "internal", "gateway") | {"type": "Opaque"}, ("secret",))
        if self.spec.redis.mode is RedisMode.MANAGED:
            yield RandomSecret(self.named("v1", "Secret", "redis", "redis") | {"type": "Opaque"}, ("password",))

    def accounts(self) -> Iterator[Manifest]:
        for account in ("gateway", "worker"):
            yield self.named("v1", "ServiceAccount", account, account) | {"automountServiceAccountToken": False}

    def services(self) -> Iterator[Manifest]:
        for role in ROLES:
            yield self.named("v1", "Service", role, role) | {
                "spec": {
                    "clusterIP": "None",
                    "publishNotReadyAddresses": True,  # a worker says itself whether it is ready
                    "selector": self.selector(role),
                    "ports": [_service_port("grpc", GRPC_PORT), _service_port("health", HEALTH_PORT)],
                }
            }
        yield self.named("v1", "Service", "", "gateway") | {
            "spec": {
                "type": self.spec.gateway.service_type,
                "selector": self.selector("gateway"),
                "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
            }
        }
        yield self.named("v1", "Service", "gateway", "gateway") | {
            "spec": {
                "clusterIP": "None",
                "selector": self.selector("gateway"),
                "ports": [_service_port("internal", INTERNAL_PORT)],
            }
        }

    def redis(self) -> Iterator[Manifest]:
        if self.spec.redis.mode is not RedisMode.MANAGED:
            return
        password = {"secretKeyRef": {"name": f"{self.name}-redis", "key": "password"}}
        container = _restricted_container("redis", self.platform.redis_image, self.spec.image.pull_policy) | {
            # Membership alone, told again by every worker: nothing is worth a disk.
            "command": ["redis-server"],
            "args": ["--save", "", "--appendonly", "no", "--dir", "/tmp",
                     "--maxmemory", "64mb", "--maxmemory-policy", "noeviction", "--requirepass", "$(REDIS_PASSWORD)"],
            "env": [{"name": "REDIS_PASSWORD", "valueFrom": password}],
            "ports": [_port("redis", REDIS_PORT)],
            "resources": _resources(Resources(), _REDIS_DEFAULTS),
            "readinessProbe": {"tcpSocket": {"port": "redis"}, "periodSeconds": 5},
            "livenessProbe": {"tcpSocket": {"port": "redis"}, "periodSeconds": 10, "failureThreshold": 3},
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }  # fmt: skip
        pod = _restricted_pod(container)
        pod |= _present(imagePullSecrets=[{"name": name} for name in self.spec.image.pull_secrets])
        yield self.named("v1", "Service", "redis", "redis") | {
            "spec": {"selector": self.selector("redis"), "ports": [_service_port("redis", REDIS_PORT)]}
        }
        yield self.named("apps/v1", "Deployment", "redis", "redis") | {
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": self.selector("redis")},
                "strategy": {"type": "Recreate"},
                "revisionHistoryLimit": 1,
                "template": {"metadata": {"labels": self.labels("redis")}, "spec": pod},
            }
        }

    def disruption_budgets(self) -> Iterator[Manifest]:
        """One pod at a time, also where there is only one: a budget that blocks a drain for ever helps nobody."""
        for component in (*ROLES, "gateway"):
            yield self.named("policy/v1", "PodDisruptionBudget", component, component) | {
                "spec": {"maxUnavailable": 1, "selector": {"matchLabels": self.selector(component)}}
            }

    def network_policies(self) -> Iterator[Manifest]:
        """Nothing may reach anything, but for: clients -> gateway -> workers <-> workers, all -> Redis and DNS."""
        if not self.spec.network_policies:
            return
        workers = [self._peer(role) for role in ROLES]
        outward = [*_dns(), *self._to_redis(), *([] if self.spec.model.is_path else [{"ports": [_tcp(443)]}])]
        to_workers = {"to": workers, "ports": [_tcp(GRPC_PORT)]}
        prober = {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": self.platform.operator_namespace}},
            "podSelector": {"matchLabels": {PROBER_LABEL: "true"}},
        }
        yield self._policy("default", {SERVICE_LABEL: self.name}, ingress=[], egress=[])
        yield self._policy(
            "gateway",
            self.selector("gateway"),
            ingress=[
                {"ports": [_tcp(API_PORT)]},
                {
                    "from": [prober, {"podSelector": {"matchLabels": {PROBER_LABEL: "true"}}}],
                    "ports": [_tcp(INTERNAL_PORT)],
                },
            ],
            egress=[to_workers, *outward],
        )
        between_workers = [_tcp(GRPC_PORT), *([_tcp(*UCX_PORTS)] if self.spec.uses_ucx_ports else [])]
        for role in ROLES:
            yield self._policy(
                role,
                self.selector(role),
                ingress=[
                    {"from": [self._peer("gateway")], "ports": [_tcp(GRPC_PORT)]},
                    {"from": workers, "ports": between_workers},
                    {"from": [{"namespaceSelector": {}}], "ports": [_tcp(HEALTH_PORT)]},  # whoever collects metrics
                ],
                egress=[{"to": workers, "ports": between_workers}, *outward],
            )
        if self.spec.redis.mode is RedisMode.MANAGED:
            members = [self._peer("gateway"), *workers]
            yield self._policy(
                "redis", self.selector("redis"), ingress=[{"from": members, "ports": [_tcp(REDIS_PORT)]}], egress=[]
            )

    def _policy(
        self, name: str, selector: Mapping[str, str], *, ingress: list[Object], egress: list[Object]
    ) -> Manifest:
        spec: Object = {"podSelector": {"matchLabels": dict(selector)}, "policyTypes": ["Ingress", "Egress"]}
        spec |= _present(ingress=ingress, egress=egress)
        return self.named("networking.k8s.io/v1", "NetworkPolicy", name, name) | {"spec": spec}

    def _peer(self, component: str) -> Object:
        return {"podSelector": {"matchLabels": self.selector(component)}}

    def _to_redis(self) -> list[Object]:
        match self.spec.redis.mode:
            case RedisMode.MANAGED:
                return [{"to": [self._peer("redis")], "ports": [_tcp(REDIS_PORT)]}]
            case RedisMode.EXTERNAL:
                return [{"ports": [{"protocol": "TCP"}]}]  # where it is stands in a Secret that we do not read
            case RedisMode.NONE:
                return []

    def service_monitor(self) -> Iterator[Manifest]:
        if SERVICE_MONITOR in self.platform.apis:
            yield self.named("monitoring.coreos.com/v1", "ServiceMonitor", "", "gateway") | {
                "spec": {
                    "selector": {"matchLabels": {SERVICE_LABEL: self.name}},
                    "targetLabels": [SERVICE_LABEL, COMPONENT_LABEL],  # what the chart's dashboards select by
                    "endpoints": [{"port": port, "path": "/metrics", "interval": "15s"} for port in ("http", "health")],
                }
            }

    def entries(self) -> Iterator[Manifest]:
        """The way in from outside: HTTPRoute (and the InferencePool that it leads to), or Ingress."""
        route, ingress = self.spec.gateway.http_route, self.spec.gateway.ingress
        if route is not None and HTTP_ROUTE in self.platform.apis:
            backend: Object = {"name": self.name, "port": 80}
            if route.backend == "InferencePool":
                backend = {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": self.name}
            parent = _present(name=route.parent_name, namespace=route.parent_namespace, sectionName=route.section_name)
            yield self.named("gateway.networking.k8s.io/v1", "HTTPRoute", "", "gateway") | {
                "spec": {
                    "parentRefs": [parent],
                    **_present(hostnames=list(route.hostnames)),
                    "rules": [{"backendRefs": [backend]}],
                }
            }
        if route is not None and route.backend == "InferencePool" and INFERENCE_POOL in self.platform.apis:
            yield self.named("inference.networking.k8s.io/v1", "InferencePool", "", "gateway") | {
                "spec": {
                    "selector": {"matchLabels": self.selector("gateway")},
                    "targetPorts": [{"number": API_PORT}],
                }
            }
        if ingress is not None:
            service = {"service": {"name": self.name, "port": {"name": "http"}}}
            path = {"path": "/", "pathType": "Prefix", "backend": service}
            tls = [{"hosts": [ingress.host], "secretName": ingress.tls_secret}] if ingress.tls_secret else []
            yield self.named("networking.k8s.io/v1", "Ingress", "", "gateway") | {
                "spec": {
                    **_present(ingressClassName=ingress.class_name, tls=tls),
                    "rules": [{"host": ingress.host, "http": {"paths": [path]}}],
                }
            }

    def warnings(self) -> Iterator[str]:
        unused = fields_unused(self.service, mode="cluster")
        if unused:
            yield f"only local mode reads {', '.join(unused)}"
        route = self.spec.gateway.http_route
        if route is not None and HTTP_ROUTE not in self.platform.apis:
            yield f"spec.gateway.httpRoute needs {HTTP_ROUTE}, which the cluster does not have"
        if route is not None and route.backend == "InferencePool" and INFERENCE_POOL not in self.platform.apis:
            yield f"spec.gateway.httpRoute.backend needs {INFERENCE_POOL}, which the cluster does not have"
        yield from self._gpu_warnings()

    def _gpu_warnings(self) -> Iterator[str]:
        pools = {role: self._pool_spec(role) for role in ROLES}
        for role, pool in pools.items():
            where, gpus = f"spec.pools.{role}.resources.gpus", pool.resources.gpus
            if gpus and self._device(pool) != "cuda":
                engine = self.spec.engine
                said = "device is cpu" if engine.device else f"kernels is {engine.kernels}"
                yield f"{where} is {gpus}, but spec.engine.{said}: the GPUs are held and not used"
            elif gpus > 1:
                yield f"{where} is {gpus}, but a worker uses one GPU: the others are held and not used"
        is_split = self.spec.disaggregation is not Disaggregation.NEVER
        if is_split and len({self._device(pool) == "cuda" for pool in pools.values()}) > 1:
            yield (
                "one of spec.pools has GPUs and the other has none: their KV differs in type, so none is handed over "
                "between them; give resources.gpus to both"
            )

    # ------------------------------------------------------------ names

    def named(self, api_version: str, kind: str, suffix: str, component: str) -> Object:
        owner = {
            "apiVersion": objects.API_VERSION, "kind": objects.SERVICE_KIND, "name": self.name, "uid": self.uid,
            "controller": True,
        }  # fmt: skip
        metadata = {
            "name": f"{self.name}-{suffix}" if suffix else self.name,
            "namespace": self.namespace,
            "labels": self.labels(component),
            "ownerReferences": [owner],
        }
        return {"apiVersion": api_version, "kind": kind, "metadata": metadata}

    def labels(self, component: str) -> dict[str, str]:
        return {
            "app.kubernetes.io/name": "baton",
            "app.kubernetes.io/instance": self.name,
            "app.kubernetes.io/managed-by": "baton-operator",
            **self.selector(component),
        }

    def selector(self, component: str) -> dict[str, str]:
        return {SERVICE_LABEL: self.name, COMPONENT_LABEL: component}


# ---------------------------------------------------------------- parts

_CACHE_ENV = (
    {"name": "HOME", "value": "/tmp"},
    {"name": "XDG_CACHE_HOME", "value": CACHE},
    {"name": "BATON_MODEL_CACHE", "value": f"{CACHE}/models"},
)


def _restricted_pod(container: Object) -> Object:
    """Pod security level `restricted`; no token of the API server."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }  # fmt: skip


def _restricted_container(name: str, image: str, pull_policy: str) -> Object:
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": pull_policy,
        "terminationMessagePolicy": "FallbackToLogsOnError",  # `kubectl describe pod` says why a start failed
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _probes(port: int) -> Object:
    """Loading weights may take long and says how far it is; a process that works is not asked to hurry."""

    def probe(path: str, period_s: int, failures: int) -> Object:
        get = {"path": path, "port": port}
        return {"httpGet": get, "periodSeconds": period_s, "timeoutSeconds": 5, "failureThreshold": failures}

    return {
        "startupProbe": probe("/startupz", 2, 900),
        "livenessProbe": probe("/livez", 10, 3),
        "readinessProbe": probe("/readyz", 2, 2),
    }


def _resources(stated: Resources, default: Mapping[str, str]) -> Object:
    """Memory is limited whatever is stated: sizes inside follow the limit. Requested is what may be used."""
    memory = stated.limits.get("memory") or stated.requests.get("memory") or default["memory"]
    limits = {"memory": memory, **stated.limits}
    if stated.gpus:
        limits[stated.gpu_resource] = str(stated.gpus)
    requests = {"cpu": stated.limits.get("cpu", default["cpu"]), "memory": memory, **stated.requests}
    return {"requests": requests, "limits": limits}


def _merged_env(more: Mapping[str, str], own: list[Object]) -> list[Object]:
    names = {variable["name"] for variable in own}
    return [*own, *({"name": name, "value": value} for name, value in sorted(more.items()) if name not in names)]


def _secret_volume(name: str) -> Object:
    return {"secret": {"secretName": name, "defaultMode": 0o440}}


def _port(name: str, number: int) -> Object:
    return {"name": name, "containerPort": number, "protocol": "TCP"}


def _service_port(name: str, number: int) -> Object:
    return {"name": name, "port": number, "targetPort": number, "protocol": "TCP"}


def _tcp(number: int, last: int | None = None) -> Object:
    return {"protocol": "TCP", "port": number, **_present(endPort=last)}


def _dns() -> list[Object]:
    return [{"ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]}]


def _stated(flag: str, value: object) -> list[str]:
    """The flag if the service states a value: what it leaves open is the process's own default."""
    return [] if value is None else [flag, str(value)]


def _present(**fields: Any) -> Object:
    """Without what is empty: the API server drops it, and it would seem to differ for ever."""
    return {name: value for name, value in fields.items() if value}


def _dump(part: Any) -> Object:
    dumped: Object = part.model_dump(by_alias=True, exclude_none=True, mode="json")
    return dumped
