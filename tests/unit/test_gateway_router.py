"""The router: tables of worker states, and the decision."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.router import MAX_CANDIDATES, NoRoute, PrefixRecord, Route, RoutingRequest, WorkerState, route

REQUEST = RoutingRequest(num_prompt_tokens=1000)
LONG = replace(REQUEST, num_output_tokens=64)
NUMERICS = replace(REQUEST, numerics_fingerprint="N")


def worker(name: str, **state: object) -> WorkerState:
    defaults = {"address": f"{name}:1", "layout_fingerprint": "L", "numerics_fingerprint": "N", "max_num_seqs": 32}
    return WorkerState(name, **(defaults | {"prefill_tokens_per_s": 1000.0, "step_s": 0.02} | state))  # type: ignore[arg-type]


def chosen(decision: Route | NoRoute) -> str:
    assert isinstance(decision, Route)
    return decision.worker_id


@pytest.mark.parametrize(
    ("states", "request_", "expected"),
    [
        ([worker("a"), worker("b")], REQUEST, "a"),
        ([worker("a", num_running=8), worker("b")], REQUEST, "b"),
        ([worker("a", num_waiting_tokens=500), worker("b")], REQUEST, "b"),
        ([worker("a", num_inflight=8), worker("b")], REQUEST, "b"),
        ([worker("a", prefill_tokens_per_s=500), worker("b")], REQUEST, "b"),
        ([worker("a", free_share=0.0), worker("b", free_share=0.5)], REQUEST, "b"),
        ([worker("a"), worker("b")], replace(REQUEST, cached_tokens={"b": 900}), "b"),
        ([worker("a"), worker("b", num_running=31)], replace(REQUEST, cached_tokens={"b": 900}), "a"),
        ([worker("a", is_draining=True), worker("b", num_running=30)], REQUEST, "b"),
        ([worker("a", is_suspect=True), worker("b", num_running=30)], REQUEST, "b"),
        ([worker("a"), worker("b")], replace(REQUEST, avoid={"a"}), "b"),
        ([worker("a")], replace(REQUEST, avoid={"a"}), "a"),
        ([worker("a", numerics_fingerprint="M"), worker("b", num_running=9)], NUMERICS, "b"),
        ([worker("a", is_reserved=True), worker("b", num_running=9)], REQUEST, "b"),
        ([worker("a", num_running=1), worker("b")], replace(REQUEST, alone=True), "b"),
        ([worker("a"), worker("b", num_running=9)], replace(REQUEST, only_worker="b"), "b"),
        ([worker("a", max_model_len=1063), worker("b", max_model_len=1064, num_running=9)], LONG, "b"),
        ([worker("a", max_model_len=0), worker("b", max_model_len=1063)], LONG, "a"),  # 0: it does not say
    ],
)  # fmt: skip
def test_the_decode_worker_with_the_least_predicted_wait_is_chosen(
    states: list[WorkerState], request_: RoutingRequest, expected: str
) -> None:
    assert chosen(route(request_, states, ())) == expected


@pytest.mark.parametrize(
    ("states", "request_", "reason"),
    [
        ([], REQUEST, NoRoute.NO_WORKERS),
        ([worker("a", is_draining=True)], REQUEST, NoRoute.DRAINING),
        ([worker("a", max_model_len=1063)], LONG, NoRoute.TOO_LONG),
        ([worker("a", max_model_len=1063), worker("b", is_draining=True)], LONG, NoRoute.DRAINING),
        ([worker("a", is_reserved=True)], REQUEST, NoRoute.RESERVED),
        ([worker("a")], replace(REQUEST, numerics_fingerprint="M"), NoRoute.NUMERICS),
        ([worker("a")], replace(REQUEST, layout_fingerprint="M"), NoRoute.NUMERICS),
        ([worker("a", num_running=1)], replace(REQUEST, alone=True), NoRoute.BUSY),
        ([worker("a")], replace(REQUEST, only_worker="x"), NoRoute.NOT_FOUND),
    ],
)
def test_the_reason_why_nothing_is_routable_is_named(
    states: list[WorkerState], request_: RoutingRequest, reason: NoRoute
) -> None:
    assert route(request_, states, ()) is reason


def test_suspects_are_used_when_most_workers_are_suspect() -> None:
    states = [worker("a", is_suspect=True), worker("b", is_suspect=True), worker("c", num_running=30)]
    assert chosen(route(REQUEST, states, ())) == "a"


def test_prefill_candidates_are_ordered_by_queue_and_cached_prefix() -> None:
    prefill = [worker("p1", num_waiting_tokens=2000), worker("p2"), worker("p3", num_waiting_tokens=400)]
    decision = route(replace(REQUEST, cached_tokens={"p3": 960}), [worker("d")], prefill)
    assert isinstance(decision, Route)
    assert [candidate.worker_id for candidate in decision.candidates] == ["p3", "p2", "p1"]
    assert decision.candidates[0].predicted_queue_s == pytest.approx(0.4)


@pytest.mark.parametrize("change", [{"layout_fingerprint": "other"}, {"is_draining": True}, {"max_model_len": 999}])
def test_a_prefill_worker_that_cannot_serve_the_decode_worker_is_no_candidate(change: dict[str, object]) -> None:
    decision = route(REQUEST, [worker("d")], [worker("p", **change)])
    assert isinstance(decision, Route)
    assert decision.candidates == ()


def test_candidates_are_bounded() -> None:
    decision = route(REQUEST, [worker("d")], [worker(f"p{n}") for n in range(9)])
    assert isinstance(decision, Route)
    assert len(decision.candidates) == MAX_CANDIDATES


def test_the_predicted_first_token_is_held_against_the_objective() -> None:
    tight, loose = replace(REQUEST, ttft_objective_s=0.5), replace(REQUEST, ttft_objective_s=2.0)
    assert route(tight, [worker("d")], ()).meets_objective is False  # type: ignore[union-attr]
    assert route(loose, [worker("d")], ()).meets_objective is True  # type: ignore[union-attr]


def test_the_record_knows_the_longest_prefix_of_each_worker() -> None:
    record = PrefixRecord(block_size=4)
    prompt = list(range(12))
    record.note(record.chain(prompt, b"s"), ["a"])
    record.note(record.chain(prompt[:8], b"s"), ["b"])
    assert record.match(record.chain(prompt, b"s")) == {"a": 12, "b": 8}
    assert record.match(record.chain([*prompt[:4], 99, 99, 99, 99], b"s")) == {"a": 4, "b": 4}


def test_another_salt_shares_nothing() -> None:
    record = PrefixRecord(block_size=4)
    record.note(record.chain(list(range(8)), b"one"), ["a"])
    assert record.match(record.chain(list(range(8)), b"two")) == {}


def test_the_record_is_bounded_and_forgets_the_oldest() -> None:
    record = PrefixRecord(block_size=1, max_blocks=10)
    record.note(record.chain(list(range(8)), b""), ["a"])
    record.note(record.chain(list(range(100, 108)), b""), ["a"])
    assert len(record) == 10
    assert record.match(record.chain(list(range(100, 108)), b"")) == {"a": 8}


def test_a_dead_worker_is_forgotten() -> None:
    record = PrefixRecord(block_size=4)
    record.note(record.chain(list(range(8)), b""), ["a", "b"])
    record.forget("a")
    assert record.match(record.chain(list(range(8)), b"")) == {"b": 8}
    record.forget("b")
    assert len(record) == 0
