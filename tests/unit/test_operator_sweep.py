"""Every field of an LLMService set, changed, taken away and misused, in the cluster in memory.

The same against a real API server: tests/cluster/test_spec_sweep_on_server.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton_operator.objects import ROLES
from baton_operator.resources import ResourceError
from tests.spec_sweep import ITEM, Sweep, groups, num_steps, parse, stated, sweeps
from tests.unit.operator_world import Cluster, fresh, open_pools

SWEEPS = sweeps()
CHANGING = [sweep for sweep in SWEEPS if not sweep.is_immutable]


def picture_after(cluster: Cluster, spec: dict[str, Any]) -> dict[str, Any]:
    """With pools that the spec leaves open scaled to one size: what they had stays theirs otherwise."""
    cluster.set_spec(spec)
    cluster.converge()
    for role in open_pools(cluster):
        cluster.scale(role, 2)
    cluster.converge()
    return cluster.picture()


def fresh_picture(spec: dict[str, Any]) -> dict[str, Any]:
    sizes = tuple((role, 2) for role in open_pools(Cluster(spec)))
    return fresh(json.dumps(spec, sort_keys=True), sizes)


def test_there_is_a_sweep_for_both_roles_and_for_the_fields_of_lists() -> None:
    names = {sweep.name for sweep in SWEEPS}
    assert {f"spec.pools.{role}.tolerations[0].tolerationSeconds" for role in ROLES} <= names
    assert {sweep.name for sweep in SWEEPS if sweep.is_immutable} == {"spec.model.source", "spec.model.claimName"}


@pytest.mark.parametrize("sweep", CHANGING, ids=str)
def test_a_field_that_is_set_changed_and_taken_away_ends_where_a_fresh_apply_ends(sweep: Sweep) -> None:
    cluster = Cluster({})
    cluster.converge()
    for spec in (*sweep.valid, {}):
        assert picture_after(cluster, spec) == fresh_picture(spec)


def test_many_fields_at_once_end_where_a_fresh_apply_ends() -> None:
    for group in groups(seed=20261123, size=12):
        cluster = Cluster({})
        for spec in (*(stated(group, step) for step in range(num_steps(group))), {}):
            assert picture_after(cluster, spec) == fresh_picture(spec), [str(sweep) for sweep in group]


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_a_value_that_does_not_fit_is_refused_by_the_name_of_its_field(sweep: Sweep) -> None:
    assert sweep.invalid
    for spec in sweep.invalid:
        with pytest.raises(ResourceError, match=sweep.name.replace(ITEM, ".0")):
            parse(spec)
