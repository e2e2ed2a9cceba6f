"""P's state machine, event by event."""

from __future__ import annotations

import itertools

import pytest

from kvtransfer.prefill_side import (
    CloseTicket,
    GrantBackend,
    HeldTokens,
    OpenTicket,
    PrefillAction,
    PrefillLimits,
    PrefillSide,
    Publish,
    ReadyBlock,
    ReleaseBackend,
    SendDown,
    StartBackend,
    TicketState,
)
from kvtransfer.protocol import baton_pb2 as pb

BOOT = b"p" * 16
TICKET = (1).to_bytes(16, "big")


def make(held: HeldTokens | None = None, max_tickets: int = 4) -> PrefillSide:
    keys, tickets = itertools.count(100), itertools.count(1)
    return PrefillSide(
        BOOT,
        "layout",
        4,
        PrefillLimits(max_prompt_tokens=64, max_tickets=max_tickets),
        held or HeldTokens(1000),
        lambda: next(keys),
        lambda: next(tickets).to_bytes(16, "big"),
    )


def start(transfer_id: int = 1, **changes: object) -> pb.PrefillUp:
    fields: dict[str, object] = {
        "transfer_id": transfer_id,
        "token_ids": [1] * 10,
        "choices": [0],
        "layout_fingerprint": "layout",
        "deadline_s": 100.0,
    }
    return pb.PrefillUp(start=pb.StartPrefill(**{**fields, **changes}))


def credit(num_blocks: int) -> pb.PrefillUp:
    return pb.PrefillUp(credit=pb.GrantCredit(ticket=TICKET, num_blocks=num_blocks))


def acknowledge(num_blocks: int) -> pb.PrefillUp:
    return pb.PrefillUp(acknowledge=pb.AcknowledgeBlocks(ticket=TICKET, num_blocks=num_blocks))


def release(ok: bool = True) -> pb.PrefillUp:
    return pb.PrefillUp(release=pb.ReleaseTicket(ticket=TICKET, ok=ok))


def ready(index: int, num_tokens: int = 4) -> ReadyBlock:
    return ReadyBlock(index, 50 + index, 7, num_tokens, bytes([index]) * 16)


def kinds(actions: list[PrefillAction]) -> list[str]:
    return [a.message.WhichOneof("kind") or "" if isinstance(a, SendDown) else type(a).__name__ for a in actions]


def failure(actions: list[PrefillAction]) -> pb.PrefillFailure | None:
    return next((a.message.failed.reason for a in actions if isinstance(a, SendDown) and a.message.failed.reason), None)


def started(side: PrefillSide) -> None:
    side.handle(start(), 0.0)
    side.prefill_starting(100, 3, 0, 0.0)


def draining(side: PrefillSide) -> None:
    started(side)
    side.handle(credit(3), 0.0)
    side.blocks_filled(100, [ready(0), ready(1)], 0.0)
    side.prefill_done(100, ready(2, 2), [pb.FirstToken(choice=0)], 0.1, 0.2, 0.0)


def test_a_whole_ticket_step_by_step() -> None:
    side = make()
    assert kinds(side.handle(start(), 0.0)) == ["OpenTicket", "queued", "StartBackend"]
    assert kinds(side.prefill_starting(100, 3, 0, 0.1)) == ["starting"]
    assert side.handle(credit(3), 0.2) == [GrantBackend(100, 3)]
    assert kinds(side.blocks_filled(100, [ready(0), ready(1)], 0.3)) == ["Publish", "published"]
    done = side.prefill_done(100, ready(2, 2), [pb.FirstToken(choice=0)], 0.1, 0.2, 0.4)
    assert kinds(done) == ["Publish", "manifest"]
    assert side.handle(acknowledge(3), 0.5) == []
    assert side.handle(release(), 0.6) == [CloseTicket(TICKET), ReleaseBackend(100, ok=True)]
    assert side.state(TICKET) is TicketState.CLOSED


def test_tickets_are_random_by_default() -> None:
    side = PrefillSide(BOOT, "layout", 4, PrefillLimits(64), HeldTokens(9), itertools.count().__next__)
    tickets = [a.ticket for i in (1, 2) for a in side.handle(start(i), 0.0) if isinstance(a, OpenTicket)]
    assert len({*tickets}) == 2
    assert {len(ticket) for ticket in tickets} == {16}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token_ids": []}, pb.PREFILL_FAILURE_INVALID),
        ({"token_ids": [1] * 65}, pb.PREFILL_FAILURE_INVALID),
        ({"num_blocks_held": 3}, pb.PREFILL_FAILURE_INVALID),
        ({"deadline_s": 0.0}, pb.PREFILL_FAILURE_INVALID),
        ({"deadline_s": float("nan")}, pb.PREFILL_FAILURE_INVALID),
        ({"deadline_s": float("inf")}, pb.PREFILL_FAILURE_INVALID),
        ({"deadline_s": 1e300}, pb.PREFILL_FAILURE_INVALID),
        ({"choices": [0, 0]}, pb.PREFILL_FAILURE_INVALID),
        ({"layout_fingerprint": "other"}, pb.PREFILL_FAILURE_LAYOUT),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(changes: dict[str, object], reason: pb.PrefillFailure) -> None:
    actions = make().handle(start(**changes), 0.0)
    assert kinds(actions) == ["failed"]
    assert failure(actions) == reason


def test_full_or_draining_workers_refuse() -> None:
    side = make(max_tickets=1)
    side.handle(start(1), 0.0)
    assert failure(side.handle(start(2), 0.0)) == pb.PREFILL_FAILURE_OVERLOADED
    assert failure(make(HeldTokens(10, 10)).handle(start(), 0.0)) == pb.PREFILL_FAILURE_OVERLOADED
    side.is_draining = True
    assert failure(side.handle(start(3), 0.0)) == pb.PREFILL_FAILURE_DRAINING


def test_what_exceeds_the_credit_is_held_back() -> None:
    side = make()
    started(side)
    side.handle(credit(1), 0.0)
    (publish, _) = side.blocks_filled(100, [ready(0), ready(1)], 0.0)
    assert isinstance(publish, Publish)
    assert [b.index for b in publish.blocks] == [0]
    assert side.prefill_done(100, ready(2, 2), [pb.FirstToken(choice=0)], 0.0, 0.0, 0.0) == []
    assert kinds(side.handle(credit(2), 0.0)) == ["GrantBackend", "Publish", "published"]
    assert kinds(side.handle(credit(3), 0.0)) == ["GrantBackend", "Publish", "manifest"]


def test_a_manifest_waits_for_the_blocks_that_are_held_back() -> None:
    """Without a tail, which would wait for credit on its own."""
    side = make()
    side.handle(start(token_ids=[1] * 8), 0.0)
    side.prefill_starting(100, 2, 0, 0.0)
    side.handle(credit(1), 0.0)
    side.blocks_filled(100, [ready(0), ready(1)], 0.0)
    assert side.prefill_done(100, None, [pb.FirstToken(choice=0)], 0.0, 0.0, 0.0) == []
    assert side.state(TICKET) is TicketState.PREFILLING
    assert kinds(side.handle(credit(2), 0.0)) == ["GrantBackend", "Publish", "published", "manifest"]


def test_blocks_that_d_holds_are_not_published() -> None:
    side = make()
    side.handle(start(num_blocks_held=1), 0.0)
    side.prefill_starting(100, 2, 0, 0.0)
    side.handle(credit(2), 0.0)
    (publish, _) = side.blocks_filled(100, [ready(0), ready(1)], 0.0)
    assert isinstance(publish, Publish)
    assert [b.index for b in publish.blocks] == [1]


def test_repeated_messages_only_count() -> None:
    side = make()
    draining(side)
    side.handle(acknowledge(2), 0.0)
    for message, counter in (
        (start(), "repeated_start"),
        (credit(3), "late_credit"),
        (acknowledge(2), "repeated_acknowledge"),
        (acknowledge(1), "repeated_acknowledge"),
        (acknowledge(9), "repeated_acknowledge"),
        (pb.PrefillUp(), "unknown_kind"),
    ):
        count = side.ignored[counter]
        assert side.handle(message, 0.0) == []
        assert side.ignored[counter] == count + 1
    side.handle(release(), 0.0)
    assert side.handle(release(), 0.0) == []
    assert side.ignored["unknown_ticket"] == 1


def test_a_release_that_claims_success_too_early_is_none() -> None:
    side = make()
    started(side)
    assert side.handle(release(ok=True), 0.0)[-1] == ReleaseBackend(100, ok=False)


def test_what_d_found_damaged_is_suspect_unless_it_claims_success_too() -> None:
    for ok in (False, True):
        side = make()
        draining(side)
        message = pb.PrefillUp(release=pb.ReleaseTicket(ticket=TICKET, ok=ok, suspect=True))
        assert side.handle(message, 0.0)[-1] == ReleaseBackend(100, ok=ok, is_suspect=not ok)


def test_a_release_by_transfer_id_ends_what_has_no_known_ticket() -> None:
    side = make()
    side.handle(start(), 0.0)
    message = pb.PrefillUp(release=pb.ReleaseTicket(transfer_id=1))
    assert side.handle(message, 0.0) == [CloseTicket(TICKET), ReleaseBackend(100, ok=False)]


@pytest.mark.parametrize("prepare", [started, draining])
def test_a_decode_worker_that_acknowledges_nothing_is_dropped_after_ten_seconds(prepare: object) -> None:
    side = make()
    prepare(side)  # type: ignore[operator]  # one of two functions
    assert side.next_deadline() == 10.0
    assert side.tick(9.99) == []
    actions = side.tick(10.0)
    assert failure(actions) == pb.PREFILL_FAILURE_NO_PROGRESS
    assert kinds(actions)[1:] == ["CloseTicket", "ReleaseBackend"]


def test_an_acknowledgement_renews_the_patience() -> None:
    side = make()
    draining(side)
    side.handle(acknowledge(1), 9.0)
    assert side.tick(18.9) == []
    assert failure(side.tick(19.0)) == pb.PREFILL_FAILURE_NO_PROGRESS


def test_a_queued_prompt_waits_for_the_engine_not_for_d() -> None:
    side = make()
    side.handle(start(deadline_s=50.0), 0.0)
    assert side.tick(49.0) == []
    assert failure(side.tick(50.0)) == pb.PREFILL_FAILURE_DEADLINE


def test_a_lost_stream_closes_every_ticket_once() -> None:
    side = make()
    side.handle(start(1), 0.0)
    side.handle(start(2), 0.0)
    assert kinds(side.stream_lost()) == ["CloseTicket", "ReleaseBackend"] * 2
    assert side.stream_lost() == []
    assert side.blocks_filled(100, [ready(0)], 0.0) == []
    assert side.ignored["late_engine_event"] == 1


def test_held_tokens_follow_publication_and_release() -> None:
    held = HeldTokens(1000)
    side = make(held)
    draining(side)
    assert held.num_tokens == 10
    side.handle(release(), 0.0)
    assert held.num_tokens == 0


def test_the_engine_gets_the_start_as_it_was_asked() -> None:
    (backend,) = [a for a in make().handle(start(cache_salt=b"tenant"), 0.0) if isinstance(a, StartBackend)]
    assert backend.start.cache_salt == b"tenant"
