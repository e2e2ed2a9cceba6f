"""One revision serves a request, prefill and decode of it, whatever workers there are and whatever the file says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.revisions import Preference, RevisionCount, choose, complete_revisions, count
from gateway.router import NoRoute, Route, RoutingRequest, WorkerState, route
from gateway.routing_file import RoutingFile

REVISIONS = ("", "old", "new")


def worker(name: str, revision: str, **state: object) -> WorkerState:
    return WorkerState(name, f"{name}:1", **({"revision": revision, "layout_fingerprint": "L"} | state))  # type: ignore[arg-type]


def serving(revision: str | None, **other: object) -> RoutingRequest:
    return RoutingRequest(100, preference=Preference(revision, **other))  # type: ignore[arg-type]


def went_to(request: RoutingRequest, decode: Sequence[WorkerState], prefill: Sequence[WorkerState]) -> str:
    decision = route(request, decode, prefill)
    assert isinstance(decision, Route), decision
    return decision.revision


OLD = [worker("d-old", "old")], [worker("p-old", "old")]
BOTH = [*OLD[0], worker("d-new", "new")], [*OLD[1], worker("p-new", "new")]


@pytest.mark.parametrize(
    ("request_", "decode", "prefill", "expected"),
    [
        (serving("old"), *BOTH, "old"),
        (serving("new"), *BOTH, "new"),
        (serving("new"), *OLD, "old"),  # not here yet
        (serving("new"), BOTH[0], OLD[1], "old"),  # its prefill workers are not
        (serving("new"), OLD[0], BOTH[1], "old"),  # its decode workers are not
        (serving("new"), BOTH[0], [OLD[1][0], worker("p-new", "new", is_draining=True)], "old"),
        (serving("new"), BOTH[0], [OLD[1][0], worker("p-new", "new", layout_fingerprint="M")], "old"),
        (serving("new"), BOTH[0], [], "new"),  # no pair anywhere: decode workers prefill for themselves
        (serving("new"), OLD[0], BOTH[1][1:], "old"),
        (serving("new", needs_prefill=False), BOTH[0], OLD[1], "new"),
        (serving(None, last="old"), *BOTH, "old"),  # a revision that comes up changes nothing
        (serving(None, last="gone"), [*BOTH[0], worker("d2", "old")], BOTH[1], "old"),
        (serving("gone", last="new"), *BOTH, "new"),
        (serving("gone", last="new"), BOTH[0], OLD[1], "old"),
        (serving(""), [worker("d", "")], [worker("p", "")], ""),  # local mode
        (serving(None), [worker("d", "")], [], ""),
        (replace(serving("old"), only_revision="new"), *BOTH, "new"),
    ],
)  # fmt: skip
def test_the_revision_of_a_request(
    request_: RoutingRequest, decode: list[WorkerState], prefill: list[WorkerState], expected: str
) -> None:
    assert went_to(request_, decode, prefill) == expected


def test_a_probe_sees_no_other_revision() -> None:
    assert route(replace(serving("old"), only_revision="new"), *OLD) is NoRoute.NO_WORKERS


def test_a_forced_worker_still_gets_prefill_of_its_own_revision_only() -> None:
    decision = route(replace(serving("old"), only_worker="d-new"), *BOTH)
    assert isinstance(decision, Route)
    assert [candidate.worker_id for candidate in decision.candidates] == ["p-new"]


@pytest.mark.parametrize(("numerics", "expected"), [("N", "new"), ("other", "old")])
def test_a_request_under_way_changes_the_revision_only_where_its_bits_stay_the_same(
    numerics: str, expected: str
) -> None:
    """Its decode worker died while the service went from old to new."""
    decode = [worker("d-old", "old", numerics_fingerprint="N"), worker("d-new", "new", numerics_fingerprint=numerics)]
    begun = replace(serving("new"), numerics_fingerprint="N", layout_fingerprint="L", avoid={"d-dead"})
    decision = route(begun, decode, BOTH[1])
    assert isinstance(decision, Route)
    assert decision.worker_id == f"d-{expected}"
    assert [candidate.worker_id for candidate in decision.candidates] == [f"p-{expected}"]


def test_a_request_that_no_revision_can_continue_waits_and_says_why() -> None:
    begun = replace(serving("new"), layout_fingerprint="M")
    assert route(begun, *BOTH) is NoRoute.NUMERICS
    assert route(serving("new"), [worker("d", "new", is_draining=True)], []) is NoRoute.DRAINING


# ---------------------------------------------------------------- whatever workers there are


def workers(letter: str) -> st.SearchStrategy[list[WorkerState]]:
    one = st.builds(
        lambda n, revision, layout, numerics, draining, suspect, reserved, ahead, length: worker(
            f"{letter}{n}", revision, layout_fingerprint=layout, numerics_fingerprint=numerics, is_draining=draining,
            is_suspect=suspect, is_reserved=reserved, num_running=ahead, max_num_seqs=8, max_model_len=length,
        ),
        st.integers(0, 99), st.sampled_from(REVISIONS), st.sampled_from("LM"), st.sampled_from("NO"), st.booleans(),
        st.booleans(), st.booleans(), st.integers(0, 20), st.sampled_from((0, 50, 200)),
    )  # fmt: skip
    return st.lists(one, max_size=8, unique_by=lambda state: state.worker_id)


preferences = st.builds(
    Preference,
    serving=st.none() | st.sampled_from((*REVISIONS, "gone")),
    last=st.none() | st.sampled_from((*REVISIONS, "gone")),
    needs_prefill=st.booleans(),
)
requests = st.builds(
    RoutingRequest,
    num_prompt_tokens=st.integers(1, 100),
    avoid=st.frozensets(st.integers(0, 99).map(lambda n: f"d{n}"), max_size=3),
    numerics_fingerprint=st.none() | st.sampled_from("NO"),
    layout_fingerprint=st.none() | st.sampled_from("LM"),
    alone=st.booleans(),
    preference=preferences,
)


@given(requests, workers("d"), workers("p"))
def test_a_pair_is_always_of_one_revision(
    request: RoutingRequest, decode: list[WorkerState], prefill: list[WorkerState]
) -> None:
    decision = route(request, decode, prefill)
    if isinstance(decision, NoRoute):
        return
    revision_of = {state.worker_id: state for state in (*decode, *prefill)}
    chosen = revision_of[decision.worker_id]
    assert chosen.revision == decision.revision
    for candidate in decision.candidates:
        sender = revision_of[candidate.worker_id]
        assert (sender.revision, sender.layout_fingerprint) == (chosen.revision, chosen.layout_fingerprint)


@given(requests, workers("d"), workers("p"))
def test_the_serving_revision_is_used_whenever_it_has_a_pair_that_can_take_the_request(
    request: RoutingRequest, decode: list[WorkerState], prefill: list[WorkerState]
) -> None:
    preference = request.preference
    able = [
        state
        for state in decode
        if not state.is_draining
        and state.takes(request.num_prompt_tokens + request.num_output_tokens)
        and request.numerics_fingerprint in (None, state.numerics_fingerprint)
        and request.layout_fingerprint in (None, state.layout_fingerprint)
    ]
    complete = complete_revisions(able, prefill) if preference.needs_prefill else {s.revision for s in able}
    decision = route(request, decode, prefill)
    if preference.serving in complete and isinstance(decision, Route):
        assert decision.revision == preference.serving
    elif (
        preference.serving in complete
    ):  # it waits, rather than go elsewhere, while each of its workers is held or busy
        served = [state for state in able if state.revision == preference.serving]
        assert [s for s in served if not s.is_reserved and not (request.alone and s.num_ahead)] == []
    elif complete and isinstance(decision, Route):
        assert decision.revision in complete
    if not able:
        assert isinstance(decision, NoRoute)


@given(preferences, workers("d"), workers("p"))
def test_every_gateway_that_sees_the_same_chooses_the_same(
    preference: Preference, decode: list[WorkerState], prefill: list[WorkerState]
) -> None:
    assert choose(preference, decode, prefill) == choose(preference, decode[::-1], prefill[::-1])


def test_workers_are_counted_by_revision() -> None:
    found = count([*BOTH[0], worker("d3", "new", is_draining=True)], OLD[1])
    assert {name: (c.prefill.ready, c.prefill.total, c.decode.ready, c.decode.total) for name, c in found.items()} == {
        "old": (1, 1, 1, 1),
        "new": (0, 0, 1, 2),
    }
    assert count([], []) == {}
    assert RevisionCount() == RevisionCount()


# ---------------------------------------------------------------- the file


def test_the_file_says_which_revision_serves_and_its_last_good_word_stands(tmp_path: Path) -> None:
    path = tmp_path / "routing.json"
    file = RoutingFile(path)
    for text, expected in (
        (None, None),
        ("", None),
        ('{"servingRevision": "old"}', "old"),
        ("", "old"),
        ('{"servingRevision"', "old"),
        ("[]", "old"),
        ('{"servingRevision": 7}', "old"),
        ('{"servingRevision": "a/b"}', "old"),
        ('{"servingRevision": "new", "more": 1}', "new"),
        (None, "new"),
        (json.dumps({"servingRevision": "x" * (65 << 10)}), "new"),
        ('{"servingRevision": ""}', ""),
    ):
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        file.refresh()
        assert file.serving == expected, text


def test_without_a_file_nothing_is_preferred() -> None:
    file = RoutingFile(None)
    file.refresh()
    assert file.serving is None
