"""The planner under any order of events: specs change, pods come late, the operator dies, hands and others interfere.

After every single write: workers never exceed what the strategy allows, the last worker of a revision that gateways
route to is never taken away, and a revision serves only after it answered. And whatever happened, once it is quiet, the
cluster is what a fresh apply of the last spec makes.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from baton_operator.objects import ROLES, Observed, Ref
from baton_operator.plan import Apply, Delete, MakeSecret, Scale, Status, Step
from tests.unit.operator_world import Cluster, Conflict, Memory, fresh, open_pools

GATEWAY = Ref("apps/v1", "Deployment", "chat-gateway")
ROUTING = Ref("v1", "ConfigMap", "chat-routing")
SIZES = st.one_of(st.none(), st.integers(1, 3))
IMAGES = st.sampled_from(["good-0", "good-1", "good-2"])
BAD_IMAGES = st.sampled_from(["broken", "mute"])


def spec_of(
    image: str, prefill: int | None, decode: int | None, *, replaces: bool, redis: bool, never: bool
) -> dict[str, Any]:
    sizes = {"prefill": prefill, "decode": decode}
    return {
        "image": {"worker": image, "gateway": f"gateway-of-{image}"},
        "pools": {role: {} if size is None else {"replicas": size} for role, size in sizes.items()},
        "rollout": {"strategy": "Replace" if replaces else "Surge", "progressDeadline": "300s"},
        "redis": {"mode": "Managed" if redis else "None"},
        "disaggregation": "Never" if never else "Auto",
        "gateway": {"replicas": 2},
    }


def specs(images: st.SearchStrategy[str], replaces: st.SearchStrategy[bool]) -> st.SearchStrategy[dict[str, Any]]:
    sizes = st.one_of(st.none(), st.integers(0, 3))
    return st.builds(
        spec_of, images, sizes, SIZES, replaces=replaces, redis=st.booleans(), never=st.booleans()
    )  # fmt: skip


class Rollouts(RuleBasedStateMachine):
    """One strategy for a run: what a change of strategy in the middle may do is bounded by the wider of the two."""

    @initialize(data=st.data(), replaces=st.booleans())
    def begin(self, data: st.DataObject, replaces: bool) -> None:
        self.replaces = replaces
        self.cluster = Cluster(data.draw(specs(IMAGES, st.just(replaces))))
        self.answered: set[str] = set()
        self.snapshots: list[Observed] = []

    # ------------------------------------------------------------ what may happen

    @rule(data=st.data())
    def spec_changes(self, data: st.DataObject) -> None:
        images = data.draw(st.sampled_from([IMAGES, IMAGES, BAD_IMAGES]))
        self.cluster.set_spec(data.draw(specs(images, st.just(self.replaces))))

    @rule(data=st.data())
    def only_the_images_change(self, data: st.DataObject) -> None:
        spec = copy.deepcopy(self.cluster.service["spec"])
        image = data.draw(st.one_of(IMAGES, BAD_IMAGES))
        spec["image"] = {"worker": image, "gateway": f"gateway-of-{image}"}
        self.cluster.set_spec(spec)

    @rule(role=st.sampled_from(ROLES), replicas=st.integers(1, 4))
    def somebody_scales(self, role: str, replicas: int) -> None:
        self.cluster.scale(role, replicas)

    @rule(seconds=st.sampled_from([1.0, 10.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.cluster.now += seconds

    @rule(data=st.data())
    def pods_of_some_deployments_come_and_go(self, data: st.DataObject) -> None:
        refs = sorted(ref for ref in self.cluster.objects if ref.kind == "Deployment")
        if refs:
            self.cluster.tick(only=set(data.draw(st.lists(st.sampled_from(refs), unique=True))))

    @rule(passes=st.integers(1, 8))
    def things_go_on(self, passes: int) -> None:
        """The operator works, pods follow, and the files of the gateways stay as they were."""
        for _ in range(passes):
            self.carry_out(self.cluster.plan())
            self.cluster.tick(only={ref for ref in self.cluster.objects if ref.kind == "Deployment"})
            self.cluster.now += 3

    @rule(index=st.integers(0, 1))
    def a_gateway_reads_its_file(self, index: int) -> None:
        if index < len(self.cluster.serving):
            self.cluster.serving[index] = self.cluster.serving_revision

    @rule()
    def every_gateway_reads_its_file(self) -> None:
        self.cluster.tick()

    @rule()
    def the_operator_works(self) -> None:
        self.carry_out(self.cluster.plan())

    @rule(steps=st.integers(0, 12))
    def the_operator_dies_in_the_middle(self, steps: int) -> None:
        self.carry_out(self.cluster.plan()[:steps])
        self.cluster.memory = Memory()

    @rule(data=st.data())
    def somebody_deletes_something(self, data: st.DataObject) -> None:
        """Not worker Deployments, whose loss is a loss of service by definition."""
        refs = sorted(
            ref for ref in self.cluster.objects if "revision" not in str(self.cluster.objects[ref]["metadata"])
        )
        if refs:
            self.cluster.delete(data.draw(st.sampled_from(refs)))

    # ------------------------------------------------------------ what must hold

    def carry_out(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            before, routed, served = self.cluster.counts(), self.routed(), self.cluster.serving_revision
            gateway_image = self.gateway_image()
            try:
                self.cluster.carry_out(step)
            except Conflict:
                return
            self.answered |= {probe.revision for probe in self.cluster.memory.probes.values() if probe.is_ok}
            if isinstance(step, Apply | Scale | Delete):
                self.check_room(before)
                self.check_last_workers(before, routed)
                self.check_flip(served)
                self.check_gateways(gateway_image)

    def routed(self) -> set[str]:
        """Revisions that requests may go to: what the file says, what gateways have read, where they send now."""
        told = {self.cluster.serving_revision, *self.cluster.serving}
        return {revision for revision in told | {self.cluster.routed(each) for each in told} if revision}

    def check_room(self, before: dict[tuple[str, str], int]) -> None:
        """No write takes a pool above what its strategy allows; what is above already does not grow."""
        for role in ROLES:
            total, was = (
                sum(count for (_, of), count in counts.items() if of == role)
                for counts in (self.cluster.counts(), before)
            )
            room = self.cluster.size(role) * (1 if self.replaces else 2)
            assert total <= max(room, was), f"{role}: {before} -> {self.cluster.counts()}, room {room}"

    def check_last_workers(self, before: dict[tuple[str, str], int], routed: set[str]) -> None:
        """Replace may: where a pool has one worker there is no room for two."""
        after = self.cluster.counts()
        for (revision, role), count in before.items():
            if revision not in routed or not count or after.get((revision, role), 0) or not self.cluster.size(role):
                continue
            told = (self.cluster.serving_revision, *self.cluster.serving)
            gives_way = self.cluster.rollout["candidate"] is not None or revision not in told
            is_replaced = self.replaces and self.cluster.size(role) == 1 and gives_way
            assert is_replaced or not self.cluster.has_pair(revision), (
                f"the last {role} worker of {revision} is gone; routed: {routed}"
            )

    def check_flip(self, served: str | None) -> None:
        """Only a revision that answered takes over from one that could serve.

        One that was given up before, and came up late, is not protected.
        """
        serving = self.cluster.serving_revision
        if None in (serving, served) or serving == served or serving in self.answered:
            return
        could = all(self.cluster.ready(served, role) for role in ROLES if self.cluster.size(role))
        assert not could, f"{serving} serves and never answered, although {served} could"

    def gateway_image(self) -> str | None:
        body = self.cluster.objects.get(GATEWAY)
        return body and body["spec"]["template"]["spec"]["containers"][0]["image"]

    def check_gateways(self, before: str | None) -> None:
        """Another image of gateways comes after the revision that it came with: it may speak with no other."""
        if before is not None and self.gateway_image() != before:
            assert self.cluster.serving_revision == self.cluster.desired.revision

    @invariant()
    def p_and_d_are_of_one_revision(self) -> None:
        if not hasattr(self, "cluster"):
            return
        revisions = {role: {of for of, kind in self.cluster.workers() if kind == role} for role in ROLES}
        assert len(revisions["prefill"] ^ revisions["decode"]) <= 2  # between the two writes that make or remove a pair

    def teardown(self) -> None:
        """When it is quiet, the past has left no trace."""
        if not hasattr(self, "cluster"):
            return
        spec = copy.deepcopy(self.cluster.service["spec"])
        if spec["image"]["worker"] in ("broken", "mute"):  # whether such a one is rolled back depends on the past
            spec["image"] = {"worker": "good-0", "gateway": "gateway-of-good-0"}
            self.cluster.set_spec(spec)
        self.cluster.converge()
        if self.cluster.rollout["failed"] is not None:  # its pods were late; it is tried again when asked for again
            assert self.cluster.rollout["failed"] == self.cluster.desired.revision
            self.cluster.set_spec(spec | {"image": {"worker": "good-3"}})
            self.cluster.converge()
            self.cluster.set_spec(spec)
            self.cluster.converge()
        sizes = tuple((role, 2) for role in open_pools(self.cluster))
        for role, replicas in sizes:
            self.cluster.scale(role, replicas)
        self.cluster.converge()
        self.cluster.memory = Memory()
        for _ in range(10):
            written = [s for s in self.cluster.plan() if isinstance(s, Apply | Scale | Delete | MakeSecret | Status)]
            assert written == []
            self.cluster.reconcile()
            self.cluster.now += 600
        assert self.cluster.picture() == fresh(json.dumps(spec, sort_keys=True), sizes)


Rollouts.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.reuse, Phase.generate],  # to shrink one takes minutes; 25 steps can be read as they are
)
TestRollouts = pytest.mark.timeout(600)(Rollouts.TestCase)  # some 8 s of work, and the machine may be busy
