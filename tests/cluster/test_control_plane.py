"""The control-plane tier: starts, works, and leaves nothing behind however it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.cluster import launch, runs
from tests.cluster.certificates import make_certificates
from tests.cluster.errors import ClusterError, StartFailed, Unavailable
from tests.cluster.forward import REPOSITORY
from tests.cluster.holder import hold_a_cluster, processes_of, supervisor_of, until_gone
from tests.cluster.kube import Cluster, write_kubeconfig


def test_an_applied_object_is_read_back(control_plane: Cluster) -> None:
    control_plane.apply(_namespace("read-back"), _config_map("read-back", {"answer": "42"}))
    assert control_plane.get("configmap", "settings", "-n", "read-back")["data"] == {"answer": "42"}


def test_controllers_make_replica_sets_and_pods_of_a_deployment(control_plane: Cluster) -> None:
    control_plane.apply(_namespace("controllers"), _deployment("controllers", replicas=2))

    def num_pods() -> int:
        return len(control_plane.get("pods", "-n", "controllers")["items"])

    control_plane.wait_until("two pods", lambda: num_pods() == 2)
    control_plane.kubectl("delete", "deployment", "web", "-n", "controllers")
    control_plane.wait_until("pods collected", lambda: num_pods() == 0)


def test_requests_are_in_the_audit_log(control_plane: Cluster) -> None:
    assert control_plane.audit_log is not None
    control_plane.apply(_namespace("audited"))
    control_plane.wait_until("audited", lambda: '"name":"audited"' in (control_plane.audit_log or Path()).read_text())


def test_kubectl_refusals_carry_its_words(control_plane: Cluster) -> None:
    with pytest.raises(ClusterError, match='namespaces "nowhere" not found'):
        control_plane.kubectl("get", "namespace", "nowhere")


def test_nothing_is_left_when_the_test_run_is_killed(control_plane: Cluster) -> None:
    """The supervisor sees the pipe close. The shared cluster beside it goes on."""
    holder, run = hold_a_cluster("control-plane")
    assert processes_of(run)
    holder.kill()
    holder.wait()
    until_gone(run)
    assert control_plane.kubectl("get", "--raw", "/readyz") == "ok"


def test_next_start_removes_what_a_killed_supervisor_left(control_plane: Cluster) -> None:
    """Killed together with its supervisor, a run leaves its folder and a live one is not touched by its cleaning."""
    holder, run = hold_a_cluster("control-plane")
    supervisor = supervisor_of(run)
    supervisor.kill()
    holder.kill()
    holder.wait()
    supervisor.wait(60.0)
    assert (runs.root() / run).exists()
    runs.clean_leftovers()
    until_gone(run)
    assert control_plane.kubectl("get", "--raw", "/readyz") == "ok"


def test_a_part_that_ends_by_itself_is_named_at_the_end(control_plane: Cluster) -> None:
    """A cluster of its own; the shared one goes on."""

    def kill_etcd() -> None:
        with launch.running("control-plane") as cluster:
            (etcd,) = [process for process in processes_of(cluster.kubeconfig.parent.name) if process.name() == "etcd"]
            etcd.kill()
            cluster.wait_until("the end of the rest", lambda: not cluster.kubeconfig.exists())

    with pytest.raises(StartFailed, match="etcd ended with status -9"):
        kill_etcd()


def test_an_existing_cluster_is_used_and_never_ended(
    control_plane: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("USE_EXISTING_CLUSTER", "true")
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    with launch.running("node") as existing:
        assert existing.kubectl("get", "--raw", "/readyz") == "ok"
        with pytest.raises(Unavailable, match="BATON_LOAD_IMAGE"):
            existing.import_image(tmp_path / "image.tar")
    assert control_plane.kubectl("get", "--raw", "/readyz") == "ok"


@pytest.mark.parametrize(
    ("words", "num_calls"),
    [
        ("error validating data: Get https://a/openapi/v2: (Client.Timeout exceeded while awaiting headers)", 2),
        ("Error from server (NotFound): Client.Timeout exceeded", 1),
    ],
    ids=["gave up on schemas", "was refused"],
)
def test_kubectl_is_run_again_where_it_had_asked_for_nothing(words: str, num_calls: int, tmp_path: Path) -> None:
    """A stand-in for kubectl that fails at first."""
    program, calls = tmp_path / "kubectl", tmp_path / "calls"
    counts = f"echo >> {calls}\n[ $(wc -l < {calls}) -gt 1 ] && exec echo done"
    program.write_text(f"#!/bin/sh\n{counts}\necho '{words}' >&2\nexit 1\n")
    program.chmod(0o755)
    cluster = Cluster(tmp_path / "config", program, url="", token="", ca_file=None, audit_log=None)
    with nullcontext() if num_calls == 2 else pytest.raises(ClusterError, match="NotFound"):
        assert cluster.kubectl("apply") == "done\n"
    assert len(calls.read_text().splitlines()) == num_calls


def test_an_existing_cluster_that_does_not_answer_is_a_reason_to_skip(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as nobody:  # bound and not listening: refused at once, and nobody else gets the port
        nobody.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{nobody.getsockname()[1]}"
        make_certificates(tmp_path, ["IP:127.0.0.1"])
        monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "config", url, tmp_path / "ca.crt", "x")))
        with pytest.raises(Unavailable, match=f"the cluster of {tmp_path}/config does not answer: (.|\\n)*refused"):
            launch.existing_cluster()


def test_without_a_kubeconfig_there_is_no_existing_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(Unavailable, match=f"needs a kubeconfig; there is no {tmp_path}/config"):
        launch.existing_cluster()


def test_a_developers_cluster_outlives_up_and_ends_with_down(control_plane: Cluster, tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # runs of other developers stay out of reach of `down`

    def developer(*words: str) -> str:
        command = [sys.executable, "-m", "tests.cluster.developer", *words]
        return subprocess.run(
            command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    said = developer("up", "control-plane")
    kubeconfig = said.removeprefix("export KUBECONFIG=").strip()
    readyz = [control_plane.kubectl_program, "get", "--raw", "/readyz", f"--kubeconfig={kubeconfig}"]
    assert subprocess.run(readyz, check=True, stdout=subprocess.PIPE, text=True).stdout == "ok"
    developer("down")
    assert not Path(kubeconfig).exists()
    assert processes_of(Path(kubeconfig).parent.name) == []


def _namespace(name: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def _config_map(namespace: str, data: dict[str, str]) -> dict[str, object]:
    metadata = {"name": "settings", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _deployment(namespace: str, replicas: int) -> dict[str, object]:
    labels = {"app": "web"}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "web", "image": "none.test/web:1"}]}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web", "namespace": namespace},
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": pod},
    }
