"""The chart's values, one model: `scripts/write_chart.py` makes values.yaml, its schema and the README's table of it.

A value enters with the template that reads it. What an LLMService says is not repeated here: `services` holds whole
specs, whose schema is the CRD's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from baton_operator.resources import LLMServiceSpec

DnsName = Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
ImageTag = Annotated[str, Field(max_length=128, pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]*)?$")]
Digest = Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")]
Strings = dict[str, str]
Objects = list[dict[str, Any]]


class _Part(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True, populate_by_name=True)


class Global(BaseModel):
    """Helm hands `global` to every chart; other charts' keys in it are not ours to refuse."""

    model_config = ConfigDict(alias_generator=to_camel, extra="allow", frozen=True, populate_by_name=True)

    image_registry: str = Field("", description="where all images come from, such as registry.example.com/baton")


class Crds(_Part):
    enabled: bool = Field(True, description="install and upgrade LLMService and LLMPool with the chart")
    keep: bool = Field(True, description="leave them, and with them every LLMService, when the chart is uninstalled")


class Image(_Part):
    repository: str = Field(min_length=1, description="name without registry and tag")
    tag: ImageTag = Field("", description="default: the chart's appVersion")
    digest: Digest = Field("", description="sha256:...; wins over the tag")


class Images(_Part):
    operator: Image = Field(Image(repository="baton-operator"), description="the operator and the `helm test`")
    gateway: Image = Field(Image(repository="baton-gateway"), description="default of LLMServices: their gateways")
    worker: Image = Field(Image(repository="baton-worker"), description="default of LLMServices: workers without a GPU")
    gpu_worker: Image = Field(
        Image(repository="baton-worker-cuda"), description="default of LLMServices: workers that ask for GPUs"
    )
    redis: Image = Field(Image(repository="baton-redis"), description="of LLMServices with redis.mode Managed")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field("IfNotPresent", description="of the operator's pod")
    pull_secrets: list[DnsName] = Field([], description="Secrets that pulling the operator's image needs")


class Operator(_Part):
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level logged")
    resources: dict[str, Any] = Field(
        {"requests": {"cpu": "50m", "memory": "192Mi"}, "limits": {"memory": "512Mi"}},
        description="CPU and memory; measured figures are in docs/log.md",
    )
    pod_labels: Strings = Field({}, description="more labels of the pod")
    pod_annotations: Strings = Field({}, description="more annotations of the pod")
    node_selector: Strings = Field({}, description="labels that the node must have")
    tolerations: Objects = Field([], description="taints to tolerate, as in a Pod")
    affinity: dict[str, Any] = Field({}, description="as in a Pod")
    priority_class_name: str = Field("", description="PriorityClass of the pod")
    extra_env: Objects = Field([], description="more environment variables, as in a container")
    extra_volumes: Objects = Field([], description="more volumes, as in a Pod")
    extra_volume_mounts: Objects = Field([], description="where they are mounted")


class ServiceAccount(_Part):
    create: bool = Field(True, description="make the operator's ServiceAccount")
    name: str = Field("", max_length=253, description="its name; default: the release's full name")
    annotations: Strings = Field({}, description="such as a cloud's identity")


class Rbac(_Part):
    create: bool = Field(True, description="make roles and bindings; templates/_rules.tpl says why each is needed")


class NetworkPolicy(_Part):
    enabled: bool = Field(
        True, description="let only Prometheus and probes reach the operator, and it only what it needs"
    )
    api_server_ports: list[Annotated[int, Field(ge=1, le=65535)]] = Field(
        [443, 6443], description="ports of the API server; its address is the cluster's secret, so no address is named"
    )
    metrics_from: Objects = Field(
        [{"namespaceSelector": {}}], description="who may read metrics, as `from` in a NetworkPolicy"
    )


class PodMonitor(_Part):
    enabled: bool = Field(False, description="let the Prometheus operator scrape the operator")
    interval: str = Field("30s", pattern=r"^[0-9]+(ms|s|m)$", description="how often")
    labels: Strings = Field({}, description="what your Prometheus selects by, such as release: kube-prometheus-stack")
    relabelings: Objects = Field([], description="as in a PodMonitor")


class PrometheusRule(_Part):
    enabled: bool = Field(False, description="install the alerts")
    labels: Strings = Field({}, description="what your Prometheus selects by")
    ttft_p99_seconds: float = Field(2.0, gt=0, description="p99 of the time to first token above which people are told")
    queue_requests: int = Field(32, ge=1, description="requests that wait for a first token for 5 minutes: too many")
    kv_usage: float = Field(0.95, gt=0, le=1, description="share of a worker's KV in use for 10 minutes: too much")


class GrafanaDashboards(_Part):
    enabled: bool = Field(False, description="install the dashboards as ConfigMaps")
    labels: Strings = Field({"grafana_dashboard": "1"}, description="what Grafana's sidecar selects by")
    annotations: Strings = Field({"grafana_folder": "Baton"}, description="such as the folder")


class Values(_Part):
    global_: Global = Field(Global(), alias="global", description="what Helm hands to every chart of a release")
    name_override: str = Field("", max_length=63, description="instead of the chart's name in names")
    fullname_override: str = Field("", max_length=63, description="instead of release and chart name in names")
    crds: Crds = Field(Crds(), description="the custom resources")
    cluster_wide: bool = Field(
        False, description="watch every namespace (a ClusterRole); false: watchNamespaces (a Role in each)"
    )
    watch_namespaces: list[DnsName] = Field([], description="namespaces to watch; none: the release's own")
    images: Images = Field(Images(), description="what runs")
    operator: Operator = Field(Operator(), description="the operator's pod: always one, replaced by Recreate")
    service_account: ServiceAccount = Field(ServiceAccount(), description="who the operator is")
    rbac: Rbac = Field(Rbac(), description="what it may do")
    network_policy: NetworkPolicy = Field(NetworkPolicy(), description="of the operator; LLMServices bring their own")
    pod_monitor: PodMonitor = Field(PodMonitor(), description="needs the Prometheus operator")
    prometheus_rule: PrometheusRule = Field(PrometheusRule(), description="needs the Prometheus operator")
    grafana_dashboards: GrafanaDashboards = Field(GrafanaDashboards(), description="needs Grafana with its sidecar")
    services: dict[DnsName, LLMServiceSpec] = Field(
        {}, description="LLMServices to keep with the release: name -> spec, as `baton export --helm` writes it"
    )
