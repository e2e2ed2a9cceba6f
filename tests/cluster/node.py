"""A whole node: the control plane, kubelet, containerd, kube-proxy and DNS in namespaces of their own.

Process, mount and network namespaces are the node's alone. The addresses are the same in every run (198.18.0.0/15 is
set aside for tests), nothing leads out, and when the first process in there dies everything else is gone with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.cluster import runs
from tests.cluster.control_plane import Endpoint, Place
from tests.cluster.images import write_image
from tests.cluster.processes import Processes

NODE_NAME = "node1"
NODE_ADDRESS = "198.18.0.1"
POD_RANGE = "198.18.1.0/24"
SANDBOX_IMAGE = "baton.test/pod:1"
_METRICS_PORT = 4443


def start_namespaces(processes: Processes, programs: Mapping[str, Path], folder: Path) -> tuple[int, Place]:
    """Make the namespaces and cgroups of a node; returns the process that holds them and where to start the rest."""
    runs.make_cgroups(folder.name)
    holder = processes.start("namespaces", [
        programs["unshare"], "--fork", "--kill-child=SIGKILL", "--pid", "--mount-proc", "--net",
        "--mount", "--propagation=slave",
        sys.executable, Path(__file__).with_name("namespace_init.py"), folder, NODE_ADDRESS,
    ])  # fmt: skip
    processes.wait_for("namespaces ready", (folder / "namespaces-ready").exists, blame="namespaces")
    (init,) = psutil.Process(holder).children()
    prefix = (str(programs["nsenter"]), f"--target={init.pid}", "--mount", "--net", "--pid", "--")
    return init.pid, Place(prefix, NODE_ADDRESS, 2379, 2380, 6443, with_endpoint=True)


def start_containerd(processes: Processes, programs: Mapping[str, Path], folder: Path, place: Place) -> Path:
    """Start it and import the sandbox image; returns its socket."""
    base = folder / "containerd"
    socket = base / "containerd.sock"
    networks = base / "networks"
    networks.mkdir(parents=True)
    (networks / "10-pods.conflist").write_text(json.dumps(_pod_network()))
    settings = base / "config.toml"
    settings.write_text(_containerd_settings(base, networks, programs["host-local"].parent))
    processes.start("containerd", [*place.prefix, programs["containerd"], f"--config={settings}"])
    archive = write_image(base / "pod.tar", SANDBOX_IMAGE, programs["pod"], ["/pod"])
    ctr = [*place.prefix, str(programs["ctr"]), f"--address={socket}"]
    processes.wait_for(
        "containerd ready",
        lambda: subprocess.run([*ctr, "version"], capture_output=True, check=False).returncode == 0,
        blame="containerd",
    )
    subprocess.run([*ctr, "--namespace=k8s.io", "images", "import", archive], check=True, capture_output=True)
    return socket


def start_kubelet(
    processes: Processes, programs: Mapping[str, Path], folder: Path, place: Place, endpoint: Endpoint, socket: Path
) -> None:
    resolver = folder / "resolv.conf"
    resolver.write_text(f"nameserver {NODE_ADDRESS}\n")
    settings = folder / "kubelet.json"
    settings.write_text(json.dumps(_kubelet_settings(folder, socket, resolver)))
    processes.start("kubelet", [
        *place.prefix, programs["kubelet"], f"--config={settings}", f"--kubeconfig={endpoint.kubeconfig}",
        f"--root-dir={folder / 'kubelet'}", f"--node-ip={NODE_ADDRESS}", f"--hostname-override={NODE_NAME}",
    ])  # fmt: skip


def start_cluster_services(
    processes: Processes, programs: Mapping[str, Path], folder: Path, place: Place, endpoint: Endpoint
) -> None:
    """Scheduler, Services and DNS."""
    processes.start("kube-scheduler", [
        *place.prefix, programs["kube-scheduler"], f"--kubeconfig={endpoint.kubeconfig}", "--leader-elect=false",
        "--secure-port=0",
    ])  # fmt: skip
    processes.start("kube-proxy", [
        *place.prefix, programs["kube-proxy"], f"--kubeconfig={endpoint.kubeconfig}",
        f"--hostname-override={NODE_NAME}", f"--cluster-cidr={POD_RANGE}", "--proxy-mode=nftables",
        # 0: leave alone what belongs to the whole machine.
        "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0s",
        "--conntrack-tcp-timeout-close-wait=0s",
    ])  # fmt: skip
    corefile = folder / "Corefile"
    corefile.write_text(_corefile(endpoint.kubeconfig))
    processes.start("dns", [*place.prefix, programs["dns"], "-conf", corefile])


def start_metrics_server(
    processes: Processes, programs: Mapping[str, Path], folder: Path, place: Place, endpoint: Endpoint
) -> list[dict[str, object]]:
    """Start it; returns the objects that make the API server ask it."""
    processes.start("metrics-server", [
        *place.prefix, programs["metrics-server"], f"--kubeconfig={endpoint.kubeconfig}",
        f"--authentication-kubeconfig={endpoint.kubeconfig}", f"--authorization-kubeconfig={endpoint.kubeconfig}",
        f"--secure-port={_METRICS_PORT}", f"--cert-dir={folder / 'metrics-server'}", "--kubelet-insecure-tls",
        "--kubelet-preferred-address-types=InternalIP", "--metric-resolution=10s",
        "--kubelet-request-timeout=5s",
    ])  # fmt: skip
    return _metrics_objects()


def _pod_network() -> dict[str, object]:
    bridge = {
        "type": "bridge", "bridge": "pods0", "isGateway": True, "hairpinMode": True,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": POD_RANGE}]], "routes": [{"dst": "0.0.0.0/0"}]},
    }  # fmt: skip
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge, ports]}


def _containerd_settings(base: Path, networks: Path, plugins: Path) -> str:
    return f"""
version = 2
root = "{base / "root"}"
state = "{base / "state"}"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs"]
[grpc]
address = "{base / "containerd.sock"}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{SANDBOX_IMAGE}"
# Without CAP_SYS_RESOURCE (a machine inside a sandbox) no sandbox starts otherwise.
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{networks}"
"""


def _kubelet_settings(folder: Path, socket: Path, resolver: Path) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": f"unix://{socket}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{folder.name}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        "oomScoreAdj": 0,
        "clusterDNS": [NODE_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": str(resolver),
        "podLogsDir": str(folder / "pod-logs"),
        "volumePluginDir": str(folder / "volume-plugins"),
        # Nobody else is in here: whoever reaches it may ask it.
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        # ConfigMaps that pods have mounted change within a second or two instead of a minute.
        "syncFrequency": "1s",
        "nodeStatusUpdateFrequency": "5s",
        "maxPods": 60,
        "serializeImagePulls": False,
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%",
        },
    }  # fmt: skip


def _corefile(kubeconfig: Path) -> str:
    """Names of the cluster, answered for a second (tests change them), and a quick no for all others."""
    return f"""
cluster.local:53 {{
    bind {NODE_ADDRESS}
    errors
    kubernetes cluster.local {{
        kubeconfig {kubeconfig} test
        ttl 1
    }}
}}
.:53 {{
    bind {NODE_ADDRESS}
    errors
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""


def _metrics_objects() -> list[dict[str, object]]:
    """A Service without selector that leads to the process, and the APIService that names it."""
    names = {"name": "metrics-server", "namespace": "kube-system"}
    return [
        {
            "apiVersion": "v1", "kind": "Service", "metadata": names,
            "spec": {"ports": [{"name": "https", "port": 443, "targetPort": _METRICS_PORT}]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": names | {"labels": {"kubernetes.io/service-name": "metrics-server"}},
            "addressType": "IPv4", "ports": [{"name": "https", "port": _METRICS_PORT}],
            "endpoints": [{"addresses": [NODE_ADDRESS], "conditions": {"ready": True}}],
        },
        {
            "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService",
            "metadata": {"name": "v1beta1.metrics.k8s.io"},
            "spec": {
                "group": "metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100,
                "insecureSkipTLSVerify": True, "service": names,
            },
        },
    ]  # fmt: skip
