"""When a live object has to be applied again, and when not."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from baton_operator.drift import differs, stamped


def deployment() -> dict[str, Any]:
    container = {"name": "c", "args": ["--a", "1"], "resources": {"requests": {"cpu": "1000m", "memory": "1024Mi"}}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "d", "labels": {"a": "b"}},
        "spec": {
            "replicas": 2,
            "template": {"spec": {"containers": [container], "volumes": [{"name": "tmp", "emptyDir": {}}]}},
        },
    }


def live() -> dict[str, Any]:
    """As the API server gives it back: defaults, quantities in its own words, other people's fields."""
    body = copy.deepcopy(stamped(deployment()))
    body["metadata"] |= {"uid": "u", "resourceVersion": "7", "generation": 1}
    body["metadata"]["annotations"]["deployment.kubernetes.io/revision"] = "1"
    pod = body["spec"]["template"]["spec"]
    pod["containers"][0]["resources"]["requests"] = {"cpu": "1", "memory": "1Gi"}
    pod["containers"][0]["terminationMessagePath"] = "/dev/termination-log"
    pod["containers"].insert(0, {"name": "sidecar", "image": "mesh"})
    pod["schedulerName"] = "default-scheduler"
    body["status"] = {"replicas": 2}
    return body


def test_what_the_api_server_and_others_add_is_no_difference() -> None:
    assert not differs(stamped(deployment()), live())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replicas"), 3),
        (("metadata", "labels", "a"), "c"),
        (("spec", "template", "spec", "containers", 1, "args"), ["--a", "1", "--b"]),
        (("spec", "template", "spec", "containers", 1, "args"), ["1", "--a"]),
        (("spec", "template", "spec", "containers", 1, "resources", "requests", "cpu"), "2"),
        (("spec", "template", "spec", "containers", 1, "name"), "other"),
        (("spec", "template", "spec", "volumes"), []),
        (("spec", "template", "spec", "volumes"), None),
    ],
)
def test_a_stated_field_that_somebody_changed_is_a_difference(path: tuple[str | int, ...], value: Any) -> None:
    body: Any = live()
    part = body
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    assert differs(stamped(deployment()), body)


def test_a_field_that_was_taken_away_is_a_difference_although_no_stated_one_differs() -> None:
    wanted = deployment()
    del wanted["spec"]["replicas"]
    assert differs(stamped(wanted), live())


def test_the_stamp_says_what_the_manifest_says_and_keeps_annotations() -> None:
    manifest = deployment()
    manifest["metadata"]["annotations"] = {"x": "y"}
    assert stamped(manifest)["metadata"]["annotations"]["x"] == "y"
    assert stamped(manifest) == stamped(copy.deepcopy(manifest))
    assert stamped(manifest) != stamped(deployment())
