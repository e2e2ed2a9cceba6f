"""What the operator takes for the present, whatever order views of an object arrive in."""

from __future__ import annotations

import tracemalloc
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from baton_operator.cache import Cache
from baton_operator.objects import SERVICE_LABEL, Ref

KEY = ("ns", "chat")
REF = Ref("apps/v1", "Deployment", "chat-gateway")


def view(version: int, *, uid: str = "a", service: str = "chat", kind: str = "Deployment", **fields: Any) -> Any:
    labels = {SERVICE_LABEL: service} if service else {}
    metadata = {"name": REF.name, "namespace": "ns", "uid": uid, "resourceVersion": str(version), "labels": labels}
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": metadata | {"managedFields": [{}]}, **fields}


def version_of(cache: Cache) -> int | None:
    found = cache.of(KEY).get(REF)
    return None if found is None else int(found["metadata"]["resourceVersion"])


def test_an_older_view_changes_nothing_and_is_no_news() -> None:
    cache = Cache()
    assert cache.put(view(7)) == KEY
    assert cache.put(view(6)) is None
    assert cache.put(view(7)) is None
    assert version_of(cache) == 7


def test_a_version_that_reads_differently_since_the_crd_was_upgraded_is_news() -> None:
    """As seen on a real API server: a watch begun before shows spec.warp no more than the CRD of that time did."""
    cache = Cache()
    key, ref = ("ns", REF.name), Ref("apps/v1", "LLMService", REF.name)
    cache.put(view(7, kind="LLMService", spec={"model": "m"}))
    listed = view(7, kind="LLMService", spec={"warp": 5, "model": "m"})
    assert cache.put(listed) == key
    assert cache.of(key)[ref]["spec"] == {"model": "m", "warp": 5}
    assert cache.put({**listed, "spec": {"model": "m", "warp": 5}}) is None, "the order of fields is no news"
    assert cache.put(view(6, kind="LLMService", spec={"model": "m"})) is None


def test_a_late_answer_does_not_revive_what_was_deleted() -> None:
    cache = Cache()
    cache.put(view(7))
    assert cache.remove(view(9)) == KEY
    assert cache.put(view(8)) is None
    assert version_of(cache) is None


def test_the_deletion_of_an_older_object_of_that_name_leaves_the_new_one() -> None:
    cache = Cache()
    cache.put(view(12, uid="b"))
    assert cache.remove(view(9, uid="a")) is None
    assert version_of(cache) == 12


def test_forgetting_hits_the_uid_that_was_deleted_alone() -> None:
    cache = Cache()
    cache.put(view(7, uid="b"))
    assert cache.forget("ns", REF, "a") is None
    assert cache.forget("ns", REF, "b") == KEY
    assert cache.put(view(7, uid="b")) is None, "the watch's event of the same state comes after the answer"


def test_an_object_whose_label_was_taken_away_is_ours_no_more() -> None:
    cache = Cache()
    cache.put(view(7))
    assert cache.put(view(8, service="")) == KEY
    assert version_of(cache) is None


def test_a_whole_list_drops_what_it_does_not_hold_but_not_what_was_made_since() -> None:
    cache = Cache()
    cache.put(view(7))
    assert cache.reconcile_with("apps/v1", "Deployment", "ns", {("ns", REF.name)}, 20) == set()
    assert cache.reconcile_with("apps/v1", "Deployment", "elsewhere", set(), 20) == set()
    assert cache.reconcile_with("apps/v1", "Deployment", "ns", set(), 20) == {KEY}
    cache.put(view(30))
    assert cache.reconcile_with("apps/v1", "Deployment", None, set(), 25) == set()
    assert version_of(cache) == 30


def test_bodies_are_kept_without_managed_fields_and_secrets_without_data() -> None:
    cache = Cache()
    cache.put(view(7, spec={"replicas": 1}))
    found = cache.of(KEY)[REF]
    assert found["spec"] == {"replicas": 1}
    assert "managedFields" not in found["metadata"]
    cache.put(view(8, kind="Secret", data={"secret": "eA=="}))
    assert "data" not in cache.of(KEY)[Ref("apps/v1", "Secret", REF.name)]


def test_a_body_takes_less_memory_than_its_json() -> None:
    cache = Cache()
    bodies = [view(7, spec={"args": [f"--option-{number}={number}" for number in range(80)]}) for _ in range(100)]
    for number, body in enumerate(bodies):
        body["metadata"]["name"] = f"chat-{number}"
    num_bytes = len(orjson.dumps(bodies))
    tracemalloc.start()
    try:
        for body in bodies:
            cache.put(body)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(cache.of(KEY)) == len(bodies)
    assert held < 0.6 * num_bytes


@given(st.permutations(range(1, 7)), st.integers(0, 6))
def test_whatever_order_views_arrive_in_the_newest_wins(order: list[int], deleted_at: int) -> None:
    """A deletion is a view, too: of its version on, nothing older is shown."""
    cache = Cache()
    for version in order:
        if version == deleted_at:
            cache.remove(view(version))
        else:
            cache.put(view(version))
    assert version_of(cache) == (None if deleted_at == 6 else 6)
    assert cache.counts() == ({} if deleted_at == 6 else {"Deployment": 1})
