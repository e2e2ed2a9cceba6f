"""Fixtures of the test cluster: one of each tier per test run, started when the first test asks.

Tests that use them live in folders whose tests share one pytest-xdist worker (tests/conftest.py), or each worker would
start its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.errors import Unavailable
from tests.cluster.kube import Cluster, NodeCluster
from tests.cluster.launch import running

_FIRST_USE_TIMEOUT_S = 900.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test that asks waits for the start, which takes a busy machine minutes."""
    for item in items:
        wanted = {"control_plane", "node_cluster"} & set(getattr(item, "fixturenames", ()))
        if wanted and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_FIRST_USE_TIMEOUT_S))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Whichever test happens to be the last pays for the end of the clusters, which has a limit of its own."""
    if nextitem is None:
        item.config.hook.pytest_timeout_cancel_timer(item=item)


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """A real API server with real controllers, shared by the test run: use namespaces and names of your own."""
    yield from _running_or_skip("control-plane")


@pytest.fixture(scope="session")
def node_cluster() -> Iterator[NodeCluster]:
    """The same with a node that runs pods, Services and DNS, metrics included; shared by the test run.

    Its network leads nowhere else, and NetworkPolicies are accepted but not enforced by the bridge plugin.
    """
    yield from _running_or_skip("node")


def _running_or_skip(tier: str) -> Iterator[NodeCluster]:
    cluster = running(tier)
    try:
        entered = cluster.__enter__()
    except Unavailable as reason:
        pytest.skip(f"{tier} tier: {reason}")
    try:
        yield entered
    finally:
        cluster.__exit__(None, None, None)
