"""D's state machine, event by event."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.config import EngineConfig
from kvtransfer.decode_side import (
    REPORT_BLOCKS,
    REPORT_S,
    Action,
    ArrivedBlock,
    Commit,
    DecodeLimits,
    DecodeSide,
    Fail,
    PrefillOrder,
    Pull,
    Reserve,
    Send,
    StopPulling,
    TransferState,
)
from kvtransfer.digest import manifest_digest
from kvtransfer.errors import FailureKind, TransferFailure
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.transport import BlockRead

BOOT = b"p" * 16
TICKET = b"t" * 16
BLOCK_SIZE, BLOCK_BYTES = 4, 100


def make(limits: DecodeLimits | None = None) -> DecodeSide:
    return DecodeSide(BOOT, "layout", BLOCK_SIZE, BLOCK_BYTES, limits or DecodeLimits(), first_transfer_id=0)


def order(
    num_tokens: int = 10, held: int = 0, choices: tuple[int, ...] = (0,), deadline_s: float = 100.0
) -> PrefillOrder:
    return PrefillOrder("r", [1] * num_tokens, held, pb.SamplingParams(), choices, b"salt", deadline_s)


def queued(transfer_id: int = 1, ticket: bytes = TICKET, boot_id: bytes = BOOT) -> pb.PrefillDown:
    return pb.PrefillDown(queued=pb.Queued(transfer_id=transfer_id, ticket=ticket, boot_id=boot_id))


def starting(num_blocks: int = 3) -> pb.PrefillDown:
    return pb.PrefillDown(starting=pb.Starting(ticket=TICKET, num_blocks=num_blocks, num_cached_tokens=4))


def ref(index: int, num_tokens: int = BLOCK_SIZE, **changes: object) -> pb.BlockRef:
    fields = {
        "index": index,
        "block_id": 50 + index,
        "generation": 7,
        "digest": bytes([index]) * 16,
        "num_tokens": num_tokens,
    }
    return pb.BlockRef(**{**fields, **changes})


def published(*refs: pb.BlockRef) -> pb.PrefillDown:
    return pb.PrefillDown(published=pb.Published(ticket=TICKET, blocks=refs))


def manifest(**changes: object) -> pb.PrefillDown:
    fields: dict[str, object] = {
        "ticket": TICKET,
        "boot_id": BOOT,
        "layout_fingerprint": "layout",
        "num_prompt_tokens": 10,
        "num_blocks": 3,
        "digest": manifest_digest(bytes([i]) * 16 for i in range(3)),
        "tail": ref(2, 2),
        "first_tokens": [pb.FirstToken(choice=0, token_id=9)],
    }
    return pb.PrefillDown(manifest=pb.Manifest(**{**fields, **changes}))


def arrived(index: int, **changes: object) -> ArrivedBlock:
    fields: dict[str, object] = {"boot_id": BOOT, "generation": 7, "num_bytes": BLOCK_BYTES, **changes}
    digest = fields.pop("digest", bytes([index]) * 16)
    return ArrivedBlock(BlockRead(index, **fields), digest)  # type: ignore[arg-type]  # a table of overrides


def filling(side: DecodeSide) -> None:
    side.start(order(), 0.0)
    side.handle(queued(), 0.0)
    side.handle(starting(), 0.0)
    side.reserved(1, 0.0)


def verifying(side: DecodeSide) -> None:
    filling(side)
    side.handle(published(ref(0), ref(1)), 0.0)
    side.handle(manifest(), 0.0)


def failure_of(actions: list[Action]) -> FailureKind | None:
    return next((a.failure.kind for a in actions if isinstance(a, Fail)), None)


def released(actions: list[Action]) -> bool:
    return any(isinstance(a, Send) and a.message.WhichOneof("kind") == "release" for a in actions)


def test_a_whole_transfer_step_by_step() -> None:
    side = make()
    transfer_id, actions = side.start(order(), 0.0)
    assert [a.message.start.num_blocks_held for a in actions if isinstance(a, Send)] == [0]
    assert side.handle(queued(), 0.1) == []
    assert side.handle(starting(), 0.2) == [Reserve(transfer_id, 0, 3)]
    (credit,) = side.reserved(transfer_id, 0.3)
    assert isinstance(credit, Send)
    assert credit.message.credit.num_blocks == 3
    (pull,) = side.handle(published(ref(0), ref(1)), 0.4)
    assert isinstance(pull, Pull)
    assert [b.block_id for b in pull.blocks] == [50, 51]
    (ack,) = side.blocks_read(transfer_id, [arrived(0), arrived(1)], 0.5)
    assert isinstance(ack, Send)
    assert ack.message.acknowledge.num_blocks == 2
    (tail,) = side.handle(manifest(), 0.6)
    assert isinstance(tail, Pull)
    actions = side.blocks_read(transfer_id, [arrived(2)], 0.7)
    assert released(actions)
    commit = actions[-1]
    assert isinstance(commit, Commit)
    assert commit.transfer_s == pytest.approx(0.1)
    assert [t.token_id for t in commit.first_tokens] == [9]
    assert side.num_transfers == 0


def test_a_manifest_shortens_no_patience_but_blocks_must_follow_it_within_its_own() -> None:
    side = make(DecodeLimits(progress_s=5.0, verify_s=8.0))
    verifying(side)
    assert side.tick(7.9) == []
    side.tick(8.0)
    assert side.state(1) is TransferState.STOPPING
    assert failure_of(side.pull_stopped(1, None, 8.1)) is FailureKind.FILL_TIMEOUT


def test_acknowledgements_come_in_groups_while_blocks_are_under_way_and_once_a_second_at_least() -> None:
    side = make()
    side.start(order(4 * 4 * REPORT_BLOCKS), 0.0)
    side.handle(queued(), 0.0)
    side.handle(starting(4 * REPORT_BLOCKS), 0.0)
    side.reserved(1, 0.0)
    side.handle(published(*(ref(i) for i in range(2 * REPORT_BLOCKS))), 0.0)

    def acknowledged(index: int, now: float) -> list[int]:
        sent = [a.message for a in side.blocks_read(1, [arrived(index)], now) if isinstance(a, Send)]
        return [m.acknowledge.num_blocks for m in sent if m.WhichOneof("kind") == "acknowledge"]

    assert [acknowledged(i, 0.1) for i in range(REPORT_BLOCKS)] == [[]] * (REPORT_BLOCKS - 1) + [[REPORT_BLOCKS]]
    assert acknowledged(REPORT_BLOCKS, 0.1 + REPORT_S) == [REPORT_BLOCKS + 1]
    rest = [acknowledged(i, 0.2 + REPORT_S) for i in range(REPORT_BLOCKS + 1, 2 * REPORT_BLOCKS)]
    assert rest == [[]] * (REPORT_BLOCKS - 2) + [[2 * REPORT_BLOCKS]]  # nothing is under way any more


def test_credit_outstanding_stays_within_the_byte_limit() -> None:
    side = make(DecodeLimits(max_outstanding_bytes=2 * BLOCK_BYTES, min_window_tokens=1))
    side.start(order(20), 0.0)
    side.handle(queued(), 0.0)
    side.handle(starting(5), 0.0)
    granted: list[int] = []

    def collect(actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send) and action.message.WhichOneof("kind") == "credit":
                granted.append(action.message.credit.num_blocks)

    collect(side.reserved(1, 0.0))
    for index in range(3):
        side.handle(published(ref(index)), 0.0)
        collect(side.blocks_read(1, [arrived(index)], 0.0))
    assert granted == [2, 3, 4, 5]


def test_a_block_larger_than_the_byte_limit_still_gets_credit() -> None:
    side = make(DecodeLimits(max_outstanding_bytes=1, min_window_tokens=1))
    side.start(order(), 0.0)
    side.handle(queued(), 0.0)
    side.handle(starting(), 0.0)
    (credit,) = side.reserved(1, 0.0)
    assert isinstance(credit, Send)
    assert credit.message.credit.num_blocks == 1


def test_credit_always_covers_a_chunk_however_large_the_blocks_are() -> None:
    chunk_size = 2 * EngineConfig(num_blocks=1).chunk_size  # one runs while the last one moves
    side = DecodeSide(BOOT, "layout", 16, 32 << 20, DecodeLimits(), first_transfer_id=0)
    side.start(order(1000), 0.0)
    side.handle(queued(), 0.0)
    side.handle(starting(63), 0.0)
    (credit,) = side.reserved(1, 0.0)
    assert isinstance(credit, Send)
    assert credit.message.credit.num_blocks * 16 >= chunk_size


def test_a_prompt_whose_blocks_d_holds_needs_only_the_first_token() -> None:
    side = make()
    side.start(order(8, held=2), 0.0)
    side.handle(queued(), 0.0)
    assert side.handle(starting(0), 0.0) == [Reserve(1, 2, 0)]
    (credit,) = side.reserved(1, 0.0)
    assert isinstance(credit, Send)
    down = manifest(num_prompt_tokens=8, num_blocks=0, tail=None, digest=manifest_digest([]))
    assert isinstance(side.handle(down, 0.0)[-1], Commit)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"boot_id": b"q" * 16}, FailureKind.STALE),
        ({"generation": 8}, FailureKind.STALE),
        ({"num_bytes": BLOCK_BYTES - 1}, FailureKind.TRUNCATED),
        ({"digest": b"x" * 16}, FailureKind.CORRUPT),
    ],
)
def test_a_read_that_differs_from_its_announcement_stops_the_pull_and_fails(
    changes: dict[str, object], kind: FailureKind
) -> None:
    side = make()
    filling(side)
    side.handle(published(ref(0)), 0.0)
    actions = side.blocks_read(1, [arrived(0, **changes)], 0.0)
    assert released(actions)
    assert isinstance(actions[-1], StopPulling)
    assert side.state(1) is TransferState.STOPPING
    assert failure_of(side.pull_stopped(1, None, 0.0)) is kind


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"layout_fingerprint": "other"}, FailureKind.LAYOUT),
        ({"num_prompt_tokens": 11}, FailureKind.PROTOCOL),
        ({"num_blocks": 2}, FailureKind.PROTOCOL),
        ({"tail": None}, FailureKind.PROTOCOL),
        ({"tail": ref(1, 2)}, FailureKind.PROTOCOL),
        ({"tail": ref(2, 3)}, FailureKind.PROTOCOL),
        ({"first_tokens": []}, FailureKind.PROTOCOL),
        ({"first_tokens": [pb.FirstToken(choice=1)]}, FailureKind.PROTOCOL),
    ],
)
def test_a_manifest_that_does_not_fit_the_order_fails(changes: dict[str, object], kind: FailureKind) -> None:
    side = make()
    filling(side)
    side.handle(published(ref(0), ref(1)), 0.0)
    side.blocks_read(1, [arrived(0), arrived(1)], 0.0)
    assert failure_of(side.handle(manifest(**changes), 0.0)) is kind


def test_a_wrong_manifest_digest_never_commits() -> None:
    side = make()
    filling(side)
    side.handle(published(ref(0), ref(1)), 0.0)
    side.handle(manifest(digest=b"x" * 16), 0.0)
    actions = side.blocks_read(1, [arrived(0), arrived(1), arrived(2)], 0.0)
    assert failure_of(actions) is FailureKind.CORRUPT


@pytest.mark.parametrize(
    "bad",
    [
        ref(3),
        ref(0, 3),
        ref(0, digest=b"short"),
        ref(2),  # the tail is not a full block
    ],
)
def test_a_block_that_cannot_be_the_prompts_fails_the_transfer(bad: pb.BlockRef) -> None:
    side = make()
    filling(side)
    assert failure_of(side.handle(published(bad), 0.0)) is FailureKind.PROTOCOL


def test_a_block_beyond_the_credit_fails_the_transfer() -> None:
    side = make(DecodeLimits(max_outstanding_bytes=BLOCK_BYTES, min_window_tokens=1))
    filling(side)
    actions = side.handle(published(ref(0), ref(1)), 0.0)
    assert isinstance(actions[-1], StopPulling)
    assert failure_of(side.pull_stopped(1, None, 0.0)) is FailureKind.PROTOCOL


@pytest.mark.parametrize(
    ("prepare", "message", "counter"),
    [
        (lambda side: None, queued(transfer_id=9), "unknown_transfer"),
        (lambda side: side.start(order(), 0.0), queued(boot_id=b"q" * 16), "other_boot_id"),
        (filling, queued(), "repeated_queued"),
        (filling, starting(), "repeated_starting"),
        (verifying, manifest(), "repeated_manifest"),
        (filling, manifest(boot_id=b"q" * 16), "other_boot_id"),
        (lambda side: None, published(ref(0)), "unknown_ticket"),
        (verifying, published(ref(0)), "repeated_block"),
        (lambda side: None, pb.PrefillDown(), "unknown_kind"),
    ],
)
def test_a_message_out_of_place_only_counts(
    prepare: Callable[[DecodeSide], object], message: pb.PrefillDown, counter: str
) -> None:
    side = make()
    prepare(side)
    before = side.state(1)
    assert side.handle(message, 0.0) == []
    assert side.ignored[counter] == 1
    assert side.state(1) is before


@pytest.mark.parametrize(
    ("prepare", "kind", "after_s"),
    [
        (lambda side: side.start(order(), 0.0), FailureKind.ANSWER_TIMEOUT, 5.0),
        (lambda side: (side.start(order(), 0.0), side.handle(queued(), 0.0)), FailureKind.QUEUE_TIMEOUT, 60.0),
        (
            lambda side: (side.start(order(), 0.0), side.handle(queued(), 0.0), side.handle(starting(), 0.0)),
            FailureKind.RESERVE_TIMEOUT,
            9.0,
        ),
        (filling, FailureKind.FILL_TIMEOUT, 30.0),
    ],
)
def test_every_state_ends_by_itself(prepare: Callable[[DecodeSide], object], kind: FailureKind, after_s: float) -> None:
    side = make()
    prepare(side)
    assert side.next_deadline() == after_s
    assert side.tick(after_s - 0.01) == []
    actions = side.tick(after_s)
    assert released(actions)
    assert failure_of(actions) is kind


def test_the_requests_deadline_ends_any_state() -> None:
    side = make()
    side.start(order(deadline_s=3.0), 0.0)
    assert failure_of(side.tick(3.0)) is FailureKind.DEADLINE


def test_cancel_before_the_ticket_is_known_names_the_transfer() -> None:
    side = make()
    side.start(order(), 0.0)
    release, fail = side.cancel(1, 0.0)
    assert isinstance(release, Send)
    assert (release.message.release.ticket, release.message.release.transfer_id) == (b"", 1)
    assert isinstance(fail, Fail)
    assert side.handle(queued(), 0.0) == []


def test_a_lost_stream_fails_all_and_tells_nobody() -> None:
    side = make()
    filling(side)
    side.handle(published(ref(0)), 0.0)
    side.start(order(), 0.0)
    actions = side.stream_lost(TransferFailure(FailureKind.STREAM_LOST), 0.0)
    assert not released(actions)
    assert [type(a) for a in actions] == [StopPulling, Fail]
    assert side.blocks_read(1, [arrived(0)], 0.0) == [], "a read that ends while stopping changes nothing"
    assert failure_of(side.pull_stopped(1, None, 0.0)) is FailureKind.STREAM_LOST


def test_a_late_reservation_only_counts() -> None:
    side = make()
    side.start(order(), 0.0)
    assert side.reserved(1, 0.0) == []
    assert side.ignored["late_reservation"] == 1


def test_only_what_p_must_compute_counts_as_waiting_for_its_steps() -> None:
    side = make()
    filling(side)
    assert side.num_waiting_for_steps == 1
    side.handle(published(ref(0), ref(1)), 0.0)
    assert side.num_waiting_for_steps == 0


def test_a_refusal_after_the_reservation_only_counts() -> None:
    side = make()
    filling(side)
    refused = TransferFailure(FailureKind.INTERNAL, "too late")
    assert side.reservation_refused(1, refused, 0.0) == []
    assert side.state(1) is TransferState.FILLING
    assert side.ignored["late_reservation"] == 1


def test_a_message_that_strayed_in_from_an_earlier_stream_names_no_transfer() -> None:
    sides = [DecodeSide(BOOT, "layout", BLOCK_SIZE, BLOCK_BYTES) for _ in range(2)]
    (stray, _), (own, _) = (side.start(order(), 0.0) for side in sides)
    assert sides[1].handle(queued(stray), 0.0) == []
    assert sides[1].ignored["unknown_transfer"] == 1
    assert sides[1].state(own) is TransferState.PROMISED
