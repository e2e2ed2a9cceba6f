"""The small pure parts of kvtransfer: liveness, candidates, frames, secrets, block source."""

from __future__ import annotations

import contextlib
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import frames
from kvtransfer.auth import Secret
from kvtransfer.candidates import Candidate, CandidatePlan
from kvtransfer.errors import FailureKind, TicketRefused, TransferFailure, TransportLost
from kvtransfer.fake_backend import FakeBlock
from kvtransfer.grpc_transport import TARGET_PIECE_BYTES, piece_bytes
from kvtransfer.liveness import LivenessMonitor, Verdict
from kvtransfer.prefill_events import BlocksFilled, PrefillDone
from kvtransfer.prefill_server import DIGEST_GROUP_BLOCKS, in_groups
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.transport import MAX_PIECE_BYTES, NOT_PUBLISHED, BlockSource, SourceBlock


def test_ten_seconds_of_silence_end_a_stream() -> None:
    monitor = LivenessMonitor(0.0)
    monitor.heard(5.0)
    assert monitor.verdict(14.9) is Verdict.ALIVE
    assert monitor.verdict(15.0) is Verdict.SILENT


def beating(monitor: LivenessMonitor, step: int, predicted_s: float, until: float) -> Verdict:
    now = monitor._heard_at
    while now < until:
        now = min(now + 1.0, until)
        monitor.heartbeat(step, predicted_s, now)
    return monitor.verdict(until)


def test_pending_work_without_a_step_is_a_stall() -> None:
    monitor = LivenessMonitor(0.0)
    monitor.heartbeat(7, 0.0, 0.0)
    monitor.pending(1, 0.0)
    assert beating(monitor, 7, 0.0, 9.9) is Verdict.ALIVE
    assert beating(monitor, 7, 0.0, 10.0) is Verdict.STALLED
    assert beating(monitor, 8, 0.0, 11.0) is Verdict.ALIVE


def test_slow_steps_get_ten_times_their_predicted_time() -> None:
    monitor = LivenessMonitor(0.0)
    monitor.heartbeat(7, 3.0, 0.0)
    monitor.pending(1, 0.0)
    assert beating(monitor, 7, 3.0, 29.0) is Verdict.ALIVE
    assert beating(monitor, 7, 3.0, 30.0) is Verdict.STALLED


def test_an_idle_worker_does_not_stall_and_new_work_starts_its_clock() -> None:
    monitor = LivenessMonitor(0.0)
    assert beating(monitor, 7, 0.0, 100.0) is Verdict.ALIVE
    monitor.pending(1, 100.0)
    assert beating(monitor, 7, 0.0, 109.0) is Verdict.ALIVE


def plan(num: int) -> CandidatePlan:
    return CandidatePlan([Candidate(f"p{i}", "a") for i in range(num)])


def test_candidates_are_tried_in_order_and_then_the_prompt_is_prefilled_locally() -> None:
    tried = plan(2)
    for name in ("p0", "p1"):
        candidate = tried.next()
        assert candidate is not None
        assert candidate.worker_id == name
        tried.failed(TransferFailure(FailureKind.OVERLOADED))
    assert tried.next() is None
    assert tried.local_reason == "prefill_overloaded"


@pytest.mark.parametrize("kind", [FailureKind.INVALID, FailureKind.DEADLINE, FailureKind.CANCELLED])
def test_a_failure_that_would_repeat_ends_the_plan(kind: FailureKind) -> None:
    tried = plan(2)
    tried.next()
    tried.failed(TransferFailure(kind))
    assert tried.next() is None
    assert tried.is_expired is (kind is not FailureKind.INVALID)


def test_no_candidate_means_local() -> None:
    assert plan(0).next() is None
    assert plan(0).local_reason == "no_candidate"


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.binary(min_size=1))
def test_frames_are_the_protocols_own_bytes(index: int, offset: int, generation: int, data: bytes) -> None:
    message = pb.PullDown(index=index, offset=offset, generation=generation, data=data)
    raw = frames.encode_header(index, offset, generation, len(data)) + data
    assert raw == message.SerializeToString()
    frame = frames.decode(message.SerializeToString())
    assert (frame.index, frame.offset, frame.generation, bytes(frame.data)) == (index, offset, generation, data)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_frame_or_refused(raw: bytes) -> None:
    with contextlib.suppress(TransportLost):
        assert frames.decode(raw).data.nbytes <= len(raw)


def test_a_secret_matches_itself_only_and_does_not_print() -> None:
    secret = Secret("s3cret")
    assert secret.matches("s3cret")
    assert secret.matches(b"s3cret")
    assert not secret.matches("s3cre")
    assert not secret.matches(None)
    assert not Secret("").matches("")
    assert "s3cret" not in repr(secret)
    assert secret.sign(b"a", b"bc") != secret.sign(b"ab", b"c")


def source() -> BlockSource:
    return BlockSource(memoryview(bytearray(40)), 10, bytes(16))


def test_a_block_stays_readable_until_its_last_ticket_closes() -> None:
    blocks = source()
    first, second = secrets.token_bytes(16), secrets.token_bytes(16)
    for ticket in (first, second):
        blocks.open(ticket)
        blocks.publish(ticket, [SourceBlock(0, 3, 5)])
    blocks.close(first)
    assert blocks.generation_table[3] == 5
    blocks.close(second)
    blocks.close(second)
    assert blocks.generation_table[3] == NOT_PUBLISHED


def test_reading_needs_a_joined_ticket() -> None:
    blocks = source()
    ticket = secrets.token_bytes(16)
    blocks.open(ticket)
    blocks.publish(ticket, [SourceBlock(0, 3, 5)])
    with pytest.raises(TicketRefused):
        blocks.read_frame(ticket, 0, 0, 10)
    blocks.join(ticket, bytes(16))
    assert frames.decode(blocks.read_frame(ticket, 0, 0, 10)).generation == 5


@given(block_bytes=st.integers(1, 8 << 20))
def test_a_block_is_cut_into_pieces_of_about_equal_size(block_bytes: int) -> None:
    piece = piece_bytes(block_bytes)
    sizes = [min(piece, block_bytes - offset) for offset in range(0, block_bytes, piece)]
    assert sum(sizes) == block_bytes
    assert max(sizes) <= TARGET_PIECE_BYTES + 64 <= MAX_PIECE_BYTES
    assert max(sizes) - min(sizes) <= 64 * len(sizes), "no short rest"


@pytest.mark.parametrize("num_blocks", [1, DIGEST_GROUP_BLOCKS, 3 * DIGEST_GROUP_BLOCKS + 1])
def test_filled_blocks_are_digested_and_published_in_groups_in_order(num_blocks: int) -> None:
    blocks = [FakeBlock(index, 7 + index, 1, 16) for index in range(num_blocks)]
    done = PrefillDone(5, None, (), 0.0, 0.0)
    *groups, last = in_groups([BlocksFilled(5, blocks), done])
    assert last is done
    filled = [group.blocks for group in groups if isinstance(group, BlocksFilled)]
    assert [block for group in filled for block in group] == blocks
    assert [len(group) for group in filled[:-1]] == [DIGEST_GROUP_BLOCKS] * (len(filled) - 1)
    assert 0 < len(filled[-1]) <= DIGEST_GROUP_BLOCKS
