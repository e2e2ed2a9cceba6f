"""Every field of an LLMService against a real API server: what is taken, what is refused, and what is left behind.

The fields and their values come out of the schema (tests/spec_sweep.py). What is refused is asked for all of them in
dry runs. Converging takes seconds: one seeded group of fields in every run, all of them by `make soak`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from baton_operator.objects import ROLES
from baton_operator.resources import API_VERSION
from tests.cluster.kube import Cluster
from tests.cluster.operator_world import Admin, World, end_state, install, new_world
from tests.cluster.test_operator_faults import difference, settle
from tests.spec_sweep import Spec, Sweep, groups, num_steps, parse, stated, sweeps

pytestmark = pytest.mark.timeout(900)
_SEED, _SIZE = 20261123, 12

_PATH = f"/apis/{API_VERSION}/namespaces/default/llmservices"
GROUPS = groups(_SEED, _SIZE)


@pytest.fixture(scope="module")
def admin(control_plane: Cluster) -> Iterator[Admin]:
    """With what admission asks for by the names that the sweep uses."""
    if control_plane.ca_file is None:
        pytest.skip("needs a cluster of its own: the administrator's token is used directly")
    found = Admin(control_plane)
    install(found)
    for name in ("one", "two"):
        priority = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "value": 1}
        runtime = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "handler": "runc"}
        for group, plural, body in (
            ("scheduling.k8s.io", "priorityclasses", priority),
            ("node.k8s.io", "runtimeclasses", runtime),
        ):
            found.apply(f"/apis/{group}/v1/{plural}/{name}", body | {"metadata": {"name": name}})
    yield found
    found.close()


# ---------------------------------------------------------------- what is taken and what is refused


@pytest.mark.parametrize("sweep", sweeps(), ids=str)
def test_what_fits_is_taken_and_what_does_not_is_refused_by_the_name_of_its_field(sweep: Sweep, admin: Admin) -> None:
    for spec in sweep.valid:
        assert create(admin, spec)[0] == 201
    for spec in sweep.invalid:
        status, message = create(admin, spec)
        assert status == 422, f"{spec} is taken"
        assert sweep.name in message


@pytest.mark.parametrize("sweep", [sweep for sweep in sweeps() if sweep.is_immutable], ids=str)
def test_what_cannot_change_can_neither_be_changed_nor_taken_away(sweep: Sweep, admin: Admin) -> None:
    first, second = sweep.valid
    name = f"fixed-{sweep.path[-1].lower()}"
    path = f"{_PATH}/{name}"
    manifest = {"apiVersion": API_VERSION, "kind": "LLMService", "metadata": {"name": name, "namespace": "default"}}
    admin.apply(path, manifest | {"spec": first})
    try:
        for spec in (second, {}):
            query = "?fieldManager=test&force=true"
            status, answer = admin.answer(
                "PATCH", path + query, manifest | {"spec": spec}, "application/apply-patch+yaml"
            )
            assert status == 422
            assert ".".join(sweep.path) in json.loads(answer)["message"]
    finally:
        admin.call("DELETE", path)


def create(admin: Admin, spec: Spec) -> tuple[int, str]:
    manifest = {"apiVersion": API_VERSION, "kind": "LLMService", "metadata": {"name": "swept"}, "spec": spec}
    status, answer = admin.answer("POST", f"{_PATH}?dryRun=All", manifest)
    return status, json.loads(answer).get("message", "")


# ---------------------------------------------------------------- what is left behind


def test_fields_that_are_set_changed_and_taken_away_end_where_a_fresh_apply_ends(
    control_plane: Cluster, admin: Admin, tmp_path: Path
) -> None:
    sweep_group(GROUPS[0], control_plane, admin, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_every_field_set_changed_and_taken_away_ends_where_a_fresh_apply_ends(
    control_plane: Cluster, admin: Admin, tmp_path: Path
) -> None:
    bad: list[str] = []
    for done, group in enumerate(GROUPS, 1):
        folder = tmp_path / str(done)
        folder.mkdir()
        try:
            sweep_group(group, control_plane, admin, folder)
        except (AssertionError, TimeoutError) as error:
            bad.append(f"{', '.join(map(str, group))}: {error}")
            print(bad[-1][:4000])
        print(f"{done}/{len(GROUPS)} groups of up to {_SIZE} fields, {len(bad)} bad", flush=True)
    assert bad == []


def sweep_group(group: list[Sweep], cluster: Cluster, admin: Admin, folder: Path) -> None:
    """Raises: AssertionError with what differs."""
    steps = [stated(group, step) for step in range(num_steps(group))]
    with ThreadPoolExecutor(3) as pool:
        swept = pool.submit(states_after, [{}, *steps, {}], cluster, admin, folder / "swept")
        last = pool.submit(states_after, steps[-1:], cluster, admin, folder / "last")
        none = pool.submit(states_after, [{}], cluster, admin, folder / "none")
        *_, changed, taken_away = swept.result()
    assert difference(last.result()[-1], changed) == ""
    assert difference(none.result()[-1], taken_away) == ""


def states_after(specs: list[Spec], cluster: Cluster, admin: Admin, folder: Path) -> list[dict[str, Any]]:
    """Where each spec ends, one after the other in one namespace, with pools that it leaves open scaled to two."""
    folder.mkdir()
    states: list[dict[str, Any]] = []
    with new_world(cluster, admin, folder) as world:
        for spec in specs:
            world.apply(spec)
            settle(world)
            if scale_open_pools(world, spec):
                settle(world)
            states.append(end_state(world.namespace))
    return states


def scale_open_pools(world: World, spec: Spec) -> bool:
    """Who has scaled a pool keeps it so: only sizes that are set alike can be compared."""
    parsed = parse(spec).spec
    is_open = parsed.autoscaling == "External"
    pools = {"prefill": parsed.pools.prefill, "decode": parsed.pools.decode}
    scaled = [role for role in ROLES if is_open and pools[role].replicas is None]
    for role in scaled:
        world.namespace.admin.merge(
            world.namespace.path(API_VERSION, "llmpools", f"chat-{role}"), {"spec": {"replicas": 2}}
        )
    return bool(scaled)
