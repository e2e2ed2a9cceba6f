"""The transfer bench's decisions: what fits, how many rounds there are, what a goal says, and that the plot is one."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest

from bench.transfer.cases import Pace, fitting, ids_of, shape_for
from bench.transfer.decode import last_step_blocks
from bench.transfer.plot import svg
from bench.transfer.table import Goal, Kind, Medium, Row, Safety, goals, line


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def play(pace: Pace, clock: Clock, round_s: float, most: int = 9) -> int:
    num_rounds = 0
    for _ in pace.rounds(most):
        clock.now += round_s
        num_rounds += 1
    return num_rounds


def test_each_part_has_rounds_for_its_share_of_the_time() -> None:
    clock = Clock()
    pace = Pace(40.0, [1.0, 3.0], clock)
    assert play(pace, clock, round_s=2.0) == 5
    assert play(pace, clock, round_s=10.0) == 3


def test_a_part_has_one_round_in_any_case_and_leaves_the_others_less() -> None:
    clock = Clock()
    pace = Pace(10.0, [1.0, 1.0, 1.0], clock)
    assert play(pace, clock, round_s=7.0) == 1
    assert play(pace, clock, round_s=0.5) == 3
    assert play(pace, clock, round_s=99.0) == 1


def test_time_that_a_part_does_not_use_is_there_for_the_next() -> None:
    clock = Clock()
    pace = Pace(20.0, [1.0, 1.0], clock)
    assert play(pace, clock, round_s=0.5, most=2) == 2
    assert play(pace, clock, round_s=5.0) == 3


def test_no_two_of_every_second_block_are_neighbours_even_if_all_are_moved() -> None:
    shape = shape_for("8B", [1, 1024])
    ids = ids_of(3, 1024, 2, shape.num_blocks)
    assert len(set(ids)) == 1024
    assert all(abs(one - other) != 1 for one, other in itertools.pairwise(ids))


def test_what_finds_no_memory_is_left_out_and_named() -> None:
    assert fitting("8B", [1, 1024], 20 << 30) == ([1, 1024], "")
    fit, told = fitting("8B", [1, 64, 1024], 4 << 30)
    assert fit == [1, 64]
    assert told == (
        "8B: 1024 blocks are left out: both ends need 4100 MiB, three quarters of the available memory are 3072 MiB"
    )
    assert fitting("8B", [1], 1 << 20)[0] == []


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(512, 8), (1536, 12), (192, 12), (16, 1)])
def test_the_last_step_of_a_prompt_fills_what_the_steps_before_left(num_tokens: int, num_blocks: int) -> None:
    assert last_step_blocks(num_tokens) == num_blocks


def row(medium: Medium, kind: Kind, num_blocks: int, gb_per_s: float, ratio: float | None, **figures: float) -> Row:
    return Row("8B", 2 << 20, medium, kind, num_blocks, 3, 1.0, gb_per_s, ratio, ratio, **figures)


ROWS = [
    row(medium, kind, count, gb_per_s, ratio)
    for medium, gb_per_s in ((Medium.NIXL, 3.0), (Medium.SHM, 6.0), (Medium.GRPC, 1.0))
    for kind, ratio in ((Kind.RAW, 1.0), (Kind.BLOCKS, 0.79), (Kind.FRAGMENTED, 0.61))
    for count in (1, 64, 1024)
] + [row(Medium.NIXL, Kind.HANDOVER, 32, 1.0, None, beyond_ms_p50=5.1, beyond_ms_p99=9.0)]


def test_goals_name_what_was_missed_and_leave_out_small_moves() -> None:
    safeties = [Safety(Medium.NIXL, 512, 3, 800.0, 3.0, 0.2, 9.0)]
    assert [goal.line() for goal in goals(ROWS, safeties)] == [
        "nixl, neighbours, 32 MiB and more: at least 80 % of raw: 0 of 2 met; missed: 8B x 64 79.0 %, 8B x 1024 79.0 %",
        "nixl, no two neighbours: at least 60 % of raw: 2 of 2 met",
        "nixl hand-over beyond bytes/bandwidth, p50: at most 5 ms: 0 of 1 met; missed: 8B x 32 5.1 ms",
        "safety: at most 3 % of TTFT: 1 of 1 met",
    ]


def test_safety_is_held_to_the_larger_of_what_was_measured_and_what_all_digests_take() -> None:
    """A difference below zero, which a busy machine gives, meets no goal."""
    safeties = [Safety(Medium.NIXL, 512, 3, 800.0, -50.0, 0.2, 30.0), Safety(Medium.SHM, 512, 3, 800.0, 40.0, 0.0, 8.0)]
    assert goals([], safeties)[-1].line() == (
        "safety: at most 3 % of TTFT: 0 of 2 met; missed: nixl 512 tokens 3.8 %, shm 512 tokens 5.0 %"
    )


def test_a_goal_is_met_at_its_limit() -> None:
    assert Goal("least", (("a", 80.0),), 80.0, True, "%").line() == "least: 1 of 1 met"
    assert Goal("most", (("a", 5.0),), 5.0, False, "ms").line() == "most: 1 of 1 met"


def test_a_row_is_a_line_with_every_figure_that_it_has() -> None:
    assert line(ROWS[-1]).split() == ["8B", "nixl", "hand-over", "32", "3", "1.00", "1.00", "5.10", "9.00"]
    assert line(ROWS[1]).split()[-2:] == ["100", "%"]


def test_the_plot_shows_every_way_in_both_panels() -> None:
    picture = ElementTree.fromstring(svg(ROWS))
    texts = {text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert {"nixl", "shm", "grpc", "8B: blocks of 2.00 MiB", "share of raw, at most 140 %", "1,024", "GB/s"} <= texts
    points = list(picture.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(points) == 3 * 3 * 3 + 3 * 2 * 3
