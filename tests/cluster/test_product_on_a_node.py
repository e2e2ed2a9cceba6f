"""Installed by Helm, asked for by YAML: the product with real pods on a real node, and all that befalls it there.

One cluster and one service serve every test; they build on each other, from `helm install` to `helm uninstall`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml

from bench.ports import free_port
from tests.cluster import product as node_product
from tests.cluster.errors import ClusterError, Unavailable
from tests.cluster.kube import NodeCluster
from tests.cluster.product import CHART, IMAGES_OF_CHART, RELEASE, ROOT, SERVICE_LABEL, TAG, Product
from tests.e2e.chaos import workloads
from tests.e2e.reference import PROMPTS, reference_texts

NAMESPACE = "llm"
READY_TIMEOUT_S = 180.0  # from `kubectl apply` to an answer through prefill and decode; 20 s where nothing else runs
ROLLOUT_TIMEOUT_S = 240.0

# The images are built by the first test that runs: a minute, or a quarter of an hour where no layer is cached.
pytestmark = [pytest.mark.model, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def product(node_cluster: NodeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """The chart installed and `examples/llmservice.yaml` applied, with the model on a volume; not awaited."""
    try:
        helm = node_product.find_tools()
    except Unavailable as reason:
        pytest.skip(f"images: {reason}")
    if node_cluster.init_pid is None:
        pytest.skip("the node is not ours: its pods cannot be given a volume with the model, nor be killed")
    folder = tmp_path_factory.mktemp("product")
    document = llm_service()
    kinds = workloads(num_tokens=32)
    expected = node_product.local_answers(document, kinds)
    product = Product(node_cluster, helm, NAMESPACE, document, kinds, expected)
    with product.timed("images built and archived"):
        node_product.build_images(folder / "images.tar")
    with product.timed("images imported"):
        node_cluster.import_image(folder / "images.tar")
    node_product.fill_model_cache(folder / "cache")
    node_cluster.apply(*volume(folder / "cache"))
    try:
        product.helm("install", RELEASE, CHART, *image_values())
        yield product
    finally:
        print("\nproduct on a node, seconds:", product.times_s)
        node_cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
        node_cluster.kubectl("delete", "persistentvolume", NAMESPACE, "--wait=false")


def llm_service() -> dict[str, object]:
    """The example as it lies there; the model on a claim, every prompt handed over, every token the same each time."""
    document = yaml.safe_load((ROOT / "examples" / "llmservice.yaml").read_text())
    spec = document["spec"]
    spec["model"] |= {"name": "model", "cacheClaimName": "models"}
    spec |= {"disaggregation": "Always", "deterministic": True}
    spec["gateway"]["port"] = free_port()  # of local mode
    for role in ("prefill", "decode"):
        # Both revisions of a rollout find room on two cores.
        spec["pools"][role] = {"threads": 1, "resources": {"requests": {"cpu": "50m"}}}
    return document


def volume(folder: Path) -> tuple[dict[str, object], ...]:
    """A volume with the model on it, as an administrator of a cluster without a way out provides it."""
    size = {"storage": "1Gi"}
    claim = {"accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeName": NAMESPACE}
    level = {"pod-security.kubernetes.io/enforce": "restricted"}
    return (
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": level}},
        {
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": NAMESPACE},
            "spec": {
                "capacity": size, "accessModes": ["ReadWriteMany"], "storageClassName": "",
                "hostPath": {"path": str(folder), "type": "Directory"},
            },
        },
        {
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models", "namespace": NAMESPACE},
            "spec": claim | {"resources": {"requests": size}},
        },
    )  # fmt: skip


def image_values() -> list[str]:
    return ["--set=global.imageRegistry=localhost", *(f"--set=images.{name}.tag={TAG}" for name in IMAGES_OF_CHART)]


# ---------------------------------------------------------------- install and ask


def test_the_service_is_ready_within_the_stated_time(product: Product) -> None:
    with product.timed("kubectl apply to Ready"):
        product.apply(product.document)
        product.wait_until("Ready", lambda: has_condition(product, "Ready"), READY_TIMEOUT_S)
    assert re.search(r"KiB in [\d.]+ ms over grpc", product.condition("TransferReady")["message"])


def test_the_openai_client_streams_what_transformers_says(product: Product) -> None:
    with product.cluster.forward_service(NAMESPACE, product.name, 80) as address:
        client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)
        for prompt in PROMPTS[:3]:
            chunks = client.chat.completions.create(
                model="model", messages=[{"role": "user", "content": prompt}], max_tokens=64, temperature=0, stream=True
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == reference_texts()[prompt], prompt


def test_every_kind_of_request_says_what_local_mode_says(product: Product) -> None:
    with product.traffic() as traffic:
        traffic.wait_for(2 * len(product.workloads))


def test_prompts_went_from_one_pod_to_another(product: Product) -> None:
    """On a machine so busy that prefill is silent for seconds, decode prefills for itself: right, but the exception."""
    requests = product.requests()
    handed_over = [line for line in requests if line["prefill_worker_id"]]
    (prefill,), (decode,) = product.pods("prefill"), product.pods("decode")
    pairs = {(line["prefill_worker_id"], line["worker_id"]) for line in handed_over}
    assert pairs == {(prefill["metadata"]["name"], decode["metadata"]["name"])}
    assert len(handed_over) >= 0.8 * len(requests)
    assert product.metrics(decode).value("baton_placements_total", path="remote") >= len(handed_over)


def test_kubectl_says_what_there_is(product: Product) -> None:
    titles, row = product.kubectl("get", "llm").splitlines()
    said = dict(zip(titles.split(), row.split(), strict=True))
    del said["AGE"]
    assert said == {
        "NAME": product.name, "READY": "True", "MODEL": "model", "PREFILL": "1/1", "DECODE": "1/1", "MODE": "Always",
        "URL": f"http://{product.name}.{NAMESPACE}.svc",
    }  # fmt: skip
    assert "workers that run prompts and hand their KV over" in product.kubectl("explain", "llm.spec.pools")
    described = product.kubectl("describe", "llm", product.name)
    assert re.search(r"Normal +Ready .*answered a probe through the gateway", described)


def test_sizes_follow_the_memory_limit_and_pods_stay_within_it(product: Product) -> None:
    for role in ("prefill", "decode"):
        (pod,) = product.pods(role)
        (container,) = pod["spec"]["containers"]
        assert container["resources"]["limits"]["memory"] == "2Gi"
        (sized,) = [line["message"] for line in product.log(pod, role) if "KV memory" in line.get("message", "")]
        assert "limit 2048 MiB" in sized
        assert 0 < node_product.memory_peak(pod) <= 2 << 30
        (status,) = pod["status"]["containerStatuses"]
        assert status["restartCount"] == 0


# ---------------------------------------------------------------- under traffic


def test_kubectl_scale_grows_a_pool(product: Product) -> None:
    with product.traffic(), product.timed("kubectl scale from 1 to 2 ready"):
        product.kubectl("scale", f"llmpool/{product.name}-decode", "--replicas=2")
        product.wait_until("2 decode workers", lambda: product.num_ready("decode") == 2)
    assert product.get("llmpool", f"{product.name}-decode")["spec"]["replicas"] == 2


def test_an_autoscaler_grows_a_pool_and_the_operator_lets_it(product: Product) -> None:
    """By the CPU time that the pods of the pool's selector really use, until it is deleted; then nobody scales."""
    pool = f"{product.name}-decode"
    product.kubectl("scale", f"llmpool/{pool}", "--replicas=1")
    product.wait_until("1 decode worker", lambda: product.num_ready("decode") == 1 == len(product.pods("decode")))
    with product.traffic():
        with product.timed("autoscaler from 1 to 2 ready"):
            product.cluster.apply(autoscaler(pool))
            product.wait_until("2 decode workers", lambda: product.num_ready("decode") == 2)
        product.wait_until("the autoscaler sees both", lambda: has_settled(product, pool, num_workers=2))
        described = product.kubectl("describe", "hpa", pool)
        assert "New size: 2; reason: cpu resource utilization (percentage of request) above target" in described
        for number in range(3):
            have_operator_look_again(product, number)
            assert replicas_and_owner(product, pool) == (2, ["kube-controller-manager"])
        product.kubectl("delete", "hpa", pool)
    have_operator_look_again(product, 3)
    assert replicas_and_owner(product, pool) == (2, ["kube-controller-manager"])
    assert product.num_ready("decode") == 2


def autoscaler(pool: str) -> dict[str, object]:
    """As `kubectl autoscale` makes it, of a pool in place of a Deployment."""
    target = {"apiVersion": "serving.baton.dev/v1alpha1", "kind": "LLMPool", "name": pool}
    cpu = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}}  # of the 50m that are requested
    spec = {"scaleTargetRef": target, "minReplicas": 1, "maxReplicas": 2}
    return {
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": pool, "namespace": NAMESPACE},
        "spec": spec | {"metrics": [{"type": "Resource", "resource": cpu}]},
    }  # fmt: skip


def has_settled(product: Product, name: str, num_workers: int) -> bool:
    status = product.get("hpa", name).get("status", {})
    is_active = any(each["type"] == "ScalingActive" and each["status"] == "True" for each in status["conditions"])
    return is_active and status["currentReplicas"] == status["desiredReplicas"] == num_workers


def have_operator_look_again(product: Product, number: int) -> None:
    num_passes = product.num_passes()
    product.kubectl("annotate", "llm", product.name, f"example.com/looked-at={number}", "--overwrite")
    product.wait_until("another pass of the operator", lambda: product.num_passes() > num_passes)


def replicas_and_owner(product: Product, pool: str) -> tuple[int, list[str]]:
    """spec.replicas, and who wrote it last (a writer that agrees would stand beside)."""
    live = product.get("llmpool", pool, "--show-managed-fields")
    entries = live["metadata"]["managedFields"]
    owners = [each["manager"] for each in entries if "f:replicas" in each["fieldsV1"].get("f:spec", {})]
    return live["spec"]["replicas"], owners


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_killed_worker_loses_no_request(product: Product, role: str) -> None:
    with product.traffic() as traffic:
        name = product.kill(role)

        def is_back() -> bool:
            pods = {pod["metadata"]["name"]: pod for pod in product.pods(role)}
            (status,) = pods[name]["status"]["containerStatuses"]
            return status["ready"] and status["restartCount"] == 1

        product.wait_until(f"{name} is back", is_back)
        traffic.wait_for(2)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_deleted_pod_loses_no_request(product: Product, role: str) -> None:
    with product.traffic():
        num_before = product.num_ready(role)
        name = product.pods(role)[0]["metadata"]["name"]
        product.kubectl("delete", "pod", name, "--wait=false")
        names = lambda: {pod["metadata"]["name"] for pod in product.pods(role)}  # noqa: E731  # asked twice
        product.wait_until("another pod", lambda: name not in names() and product.num_ready(role) == num_before)


def test_without_redis_nothing_is_lost(product: Product) -> None:
    with product.traffic() as traffic:
        (before,) = product.pods("redis")
        product.kubectl("delete", "pod", before["metadata"]["name"], "--wait=false")
        traffic.wait_for(2)
        product.wait_until("another Redis", lambda: product.num_ready("redis") == 1)
        (after,) = product.pods("redis")
    assert after["metadata"]["uid"] != before["metadata"]["uid"]


def test_another_image_takes_over_whole_under_traffic(product: Product) -> None:
    """The same content under another name: a revision of its own, so its P must never serve the old one's D."""
    other = f"localhost/baton-worker:{TAG}-again"
    ctr = ("ctr", f"--address={product.cluster.containerd_socket}", "--namespace=k8s.io", "images", "tag", "--force")
    product.cluster.run_inside(*ctr, f"localhost/baton-worker:{TAG}", other)
    before = product.service()["status"]["servingRevision"]
    num_seen = len(product.requests())
    with product.traffic() as traffic, product.timed("rollout, 1 + 2 workers beside 1 + 2"):
        product.patch({"image": {"worker": other}})
        product.wait_until("the new revision alone", lambda: has_rolled(product, before), ROLLOUT_TIMEOUT_S)
        traffic.wait_for(2)
    requests = product.requests()[num_seen:]
    revisions = [
        {product.revision_of(line[key]) for key in ("worker_id", "prefill_worker_id") if line[key]} for line in requests
    ]
    assert all(len(each) == 1 for each in revisions), "P and D of one request are of one revision"
    assert {before, product.service()["status"]["servingRevision"]} == set().union(*revisions)


def test_an_image_that_never_runs_is_rolled_back_under_traffic(product: Product) -> None:
    before = product.service()["status"]["servingRevision"]
    image, missing = product.service()["spec"]["image"]["worker"], "localhost/baton-worker:missing"
    with product.traffic():
        # Long enough for a busy node to have tried the image, and for the operator to have looked at the pod then.
        worse = {"image": {"worker": missing}, "rollout": {"progressDeadline": "40s"}}
        product.patch(worse)
        product.wait_until("rolled back", lambda: product.condition("Degraded")["reason"] == "RolledBack")
        why = f"ImagePullBackOff: the image {missing} cannot be pulled"
        assert why in product.condition("Degraded")["message"]
        product.wait_until("the event", lambda: why in product.kubectl("describe", "llm", product.name))
        assert product.service()["status"]["servingRevision"] == before
        assert has_condition(product, "Ready")
        product.patch({"image": {"worker": image}})
        product.wait_until("as it was", lambda: not has_condition(product, "Degraded"))
    assert product.service()["status"]["revision"] == before


def has_rolled(product: Product, before: str) -> bool:
    status = product.service()["status"]
    serves = status["servingRevision"] == status["revision"] != before
    label = f"{SERVICE_LABEL}={product.name},serving.baton.dev/revision={before}"
    return serves and has_condition(product, "Ready") and not product.get("deployments", "-l", label)["items"]


def has_condition(product: Product, kind: str) -> bool:
    conditions = product.service().get("status", {}).get("conditions", [])
    return any(each["type"] == kind and each["status"] == "True" for each in conditions)


# ---------------------------------------------------------------- what Helm does


def test_helm_test_proves_the_hand_over(product: Product) -> None:
    with product.timed("helm test"):
        said = product.helm("test", RELEASE, "--logs")
    pods = rf"{product.name}-prefill-\S+ to {product.name}-decode-\S+"
    assert re.search(rf"{NAMESPACE}/{product.name}: [\d.]+ KiB in [\d.]+ ms over grpc, {pods}", said), said


def test_helm_upgrade_touches_no_worker(product: Product) -> None:
    before = {pod["metadata"]["uid"] for role in ("prefill", "decode", "gateway") for pod in product.pods(role)}
    with product.traffic():
        product.helm("upgrade", RELEASE, CHART, "--reuse-values", "--set=operator.logLevel=debug")
        product.kubectl("rollout", "status", f"deployment/{RELEASE}-baton", "--timeout=240s", timeout_s=300)
    after = {pod["metadata"]["uid"] for role in ("prefill", "decode", "gateway") for pod in product.pods(role)}
    assert after == before


def test_a_deleted_service_leaves_nothing(product: Product) -> None:
    kinds = (
        "llmpools,deployments,replicasets,pods,services,endpointslices,configmaps,secrets,serviceaccounts,"
        "poddisruptionbudgets,networkpolicies"
    )
    with product.timed("kubectl delete llm to nothing left"):
        product.kubectl("delete", "llm", product.name)
        product.wait_until(
            "everything gone", lambda: not product.get(kinds, "-l", f"{SERVICE_LABEL}={product.name}")["items"]
        )
    assert product.get("persistentvolumeclaim", "models")["status"]["phase"] == "Bound"


def test_helm_uninstall_keeps_the_kinds(product: Product) -> None:
    product.helm("uninstall", RELEASE, "--wait")
    for kind in ("llmservices", "llmpools"):
        assert product.cluster.get("crd", f"{kind}.serving.baton.dev")
    with pytest.raises(ClusterError, match="not found"):
        product.get("deployment", f"{RELEASE}-baton")
